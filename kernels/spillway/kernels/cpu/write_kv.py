"""New keys and values into the pool, on the CPU: as they are, or from a fused projection with norms and rotary."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spillway.kernels.cpu.checks import check_ids, check_layer, check_pool_shape, check_rows, format_code, row_stride
from spillway.kernels.cpu.elementwise_layout import WRITE_ARGUMENTS
from spillway.kernels.cpu.formats import ITEM_BYTES
from spillway.kernels.cpu.rows import run_rows
from spillway.kernels.errors import KernelShapeError


class _Pool(NamedTuple):
    """What the kernel has to know of a pool."""

    layers: int
    kv_heads: int
    block_tokens: int
    channels: int
    number_format: int
    token_bytes: int
    head_bytes: int
    layer_bytes: int


@lru_cache(maxsize=64)
def _pool(shape: torch.Size, dtype: torch.dtype) -> _Pool:
    _, layers, _, kv_heads, block_tokens, channels = check_pool_shape(shape)
    number_format = format_code("the pool", dtype, 5)
    token_bytes = channels * ITEM_BYTES[number_format]
    head_bytes = token_bytes * block_tokens
    return _Pool(
        layers, kv_heads, block_tokens, channels, number_format, token_bytes, head_bytes, 2 * kv_heads * head_bytes
    )


class _Source(NamedTuple):
    """Where a token's heads come from: addresses and strides."""

    rows: int
    number_format: int
    q: int
    q_stride: int
    q_heads: int
    k: int
    k_stride: int
    v: int
    v_stride: int


class _Rotary(NamedTuple):
    """What happens to them on the way: addresses, 0 for what is not wanted."""

    cos_sin: int = 0
    stride: int = 0
    positions: int = 0
    half: int = 0
    q_norm: int = 0
    k_norm: int = 0
    eps: float = 0.0


def write_kv(k: Tensor, v: Tensor, pool: Tensor, layer: int, slots: Tensor, *, kv_scales: Tensor | None = None) -> None:
    """See `spillway.kernels.write_kv`."""
    if k.dim() != 3 or k.shape[1:] != pool.shape[3::2]:
        raise KernelShapeError(f"k must be [tokens, kv_heads, head_dim] of the pool, got {tuple(k.shape)}")
    row = k.shape[1] * k.shape[2]
    k_stride, v_stride = row_stride("k", k, row), check_rows("v", v, k.shape, k.dtype, row)
    number_format = format_code("k", k.dtype, 3)
    source = _Source(k.shape[0], number_format, 0, 0, 0, k.data_ptr(), k_stride, v.data_ptr(), v_stride)
    _run(source, _Rotary(), pool, layer, slots, kv_scales)


def rope_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    pool: Tensor,
    layer: int,
    slots: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    kv_scales: Tensor | None = None,
) -> None:
    """See `spillway.kernels.rope_write_kv`."""
    shape = _pool(pool.shape, pool.dtype)
    if qkv.dim() != 2 or qkv.shape[1] % shape.channels or qkv.shape[1] < 2 * shape.kv_heads * shape.channels:
        raise KernelShapeError(
            f"qkv must be [tokens, (query heads + 2 * {shape.kv_heads}) * {shape.channels}], got {tuple(qkv.shape)}"
        )
    rows, width = qkv.shape
    if cos_sin.dim() != 2 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > shape.channels:
        raise KernelShapeError(f"cos_sin must be [positions, R <= {shape.channels}], got {tuple(cos_sin.shape)}")
    number_format, stride = format_code("qkv", qkv.dtype, 3), row_stride("qkv", qkv, width)
    q_heads = width // shape.channels - 2 * shape.kv_heads
    q, item = qkv.data_ptr(), ITEM_BYTES[number_format]
    k = q + q_heads * shape.channels * item
    v = k + shape.kv_heads * shape.channels * item
    rotary = _Rotary(
        cos_sin.data_ptr(),
        check_rows("cos_sin", cos_sin, cos_sin.shape, torch.float32, cos_sin.shape[1]),
        check_ids("positions", positions, rows),
        cos_sin.shape[1] // 2,
        _norm("q_norm", q_norm, qkv, shape.channels),
        _norm("k_norm", k_norm, qkv, shape.channels),
        eps,
    )
    _run(_Source(rows, number_format, q, stride, q_heads, k, stride, v, stride), rotary, pool, layer, slots, kv_scales)


def _norm(name: str, weight: Tensor | None, qkv: Tensor, channels: int) -> int:
    if weight is None:
        return 0
    if weight.shape != (channels,) or weight.dtype is not qkv.dtype or not weight.is_contiguous():
        raise KernelShapeError(f"{name} must be {qkv.dtype} [{channels}], got {weight.dtype} {tuple(weight.shape)}")
    return weight.data_ptr()


def _run(source: _Source, rotary: _Rotary, pool: Tensor, layer: int, slots: Tensor, kv_scales: Tensor | None) -> None:
    shape = _pool(pool.shape, pool.dtype)
    check_layer(layer, shape.layers)
    if not pool.is_contiguous():
        raise KernelShapeError("the pool must be contiguous")
    if kv_scales is not None:
        check_rows("kv_scales", kv_scales, torch.Size((2, shape.kv_heads)), torch.float32, shape.kv_heads)
    run_rows(
        "write_kv", WRITE_ARGUMENTS, source.rows, (source.q_heads + 2 * shape.kv_heads) * shape.channels,
        source.number_format, shape.channels, source.q, source.q_stride,
        pool.data_ptr() + layer * shape.layer_bytes, 0,
        source.k, source.k_stride, source.v, source.v_stride,
        check_ids("slots", slots, source.rows), shape.layer_bytes // 2, shape.number_format,
        shape.layers * shape.layer_bytes, shape.head_bytes, shape.token_bytes, shape.block_tokens,
        source.q_heads, shape.kv_heads,
        rotary.cos_sin, rotary.stride, rotary.positions, rotary.half, rotary.q_norm, rotary.k_norm,
        0 if kv_scales is None else kv_scales.data_ptr(), rotary.eps,
        scratch_bytes=3 * 4 * (shape.channels + 16),
    )  # fmt: skip
