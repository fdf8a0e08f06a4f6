"""From a fused projection to finished queries and written keys and values in one pass over the rows."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.layout import check_pool
from spillway.kernels.ops.tiles import encode
from spillway.kernels.ops.write_kv import check_scales, check_slots
from spillway.kernels.tuning.gpu import INTERPRETED, power_of_two

_HEADS = 8  # heads of one program


@dataclass(frozen=True)
class RopeLayout:
    """One compiled variant.

    Attributes:
        query_heads, kv_heads, head_dim, block_tokens: shapes of model and pool.
        half: channels in each half of the rotated part; rest: channels behind it.
        heads: heads of one program.
        padded_half, padded_rest: up to powers of two; the rest's is 0 where there is none.
        q_norm, k_norm, scaled: features that are compiled in or away.
        interpreted: round for the interpreter.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    half: int
    rest: int
    heads: int
    padded_half: int
    padded_rest: int
    q_norm: bool
    k_norm: bool
    scaled: bool
    interpreted: bool


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
    layout = _layout(qkv, cos_sin, pool, q_norm, k_norm, kv_scales)
    check_slots(slots, qkv.shape[0])
    if positions.shape != slots.shape or positions.dtype is not torch.int64:
        raise KernelShapeError(f"positions must be int64 [{slots.shape[0]}], got {tuple(positions.shape)}")
    query_blocks = -(-layout.query_heads // layout.heads)
    key_blocks = -(-layout.kv_heads // layout.heads)
    launch(
        _rope_write_kv_kernel,
        (qkv.shape[0], query_blocks + 2 * key_blocks, 1),
        qkv,
        qkv,
        cos_sin,
        positions,
        pool,
        slots,
        q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv,
        kv_scales if kv_scales is not None else cos_sin,
        layer,
        eps,
        qkv.stride(0),
        pool.stride(0),
        layout=layout,
        num_warps=4,
    )


def _layout(
    qkv: Tensor, cos_sin: Tensor, pool: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, kv_scales: Tensor | None
) -> RopeLayout:
    check_pool(pool)
    kv_heads, block_tokens, head_dim = pool.shape[3:]
    heads, odd = divmod(qkv.shape[1], head_dim) if qkv.dim() == 2 else (0, 1)
    if odd or heads <= 2 * kv_heads or qkv.stride(1) != 1:
        raise KernelShapeError(f"qkv {tuple(qkv.shape)} does not fit a pool of {kv_heads} heads of {head_dim}")
    rotated = cos_sin.shape[1] if cos_sin.dim() == 2 else 0
    if not 0 < rotated <= head_dim or rotated % 2 or not cos_sin.is_contiguous():
        raise KernelShapeError(f"cos_sin must be contiguous [positions, R <= {head_dim}], got {tuple(cos_sin.shape)}")
    if cos_sin.dtype is not torch.float32:
        raise KernelDtypeError(f"cos_sin is float32, got {cos_sin.dtype}")
    for norm in (q_norm, k_norm):
        if norm is not None and norm.shape != (head_dim,):
            raise KernelShapeError(f"a head's norm has {head_dim} weights, got {tuple(norm.shape)}")
    check_scales(pool, kv_scales)
    rest = head_dim - rotated
    return RopeLayout(
        query_heads=heads - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        half=rotated // 2,
        rest=rest,
        heads=_HEADS,
        padded_half=power_of_two(rotated // 2),
        padded_rest=power_of_two(rest) if rest else 0,
        q_norm=q_norm is not None,
        k_norm=k_norm is not None,
        scaled=kv_scales is not None,
        interpreted=INTERPRETED,
    )


@triton.jit(do_not_specialize=["layer"])
def _rope_write_kv_kernel(
    qkv,  # [T, (query_heads + 2 kv_heads) * head_dim]
    cos_sin,  # [positions, 2 * half] f32
    positions,  # [T] i64
    pool,  # [blocks, layers, 2, kv_heads, block_tokens, head_dim]
    slots,  # [T] i64
    q_norm,  # [head_dim], if layout.q_norm
    k_norm,  # [head_dim], if layout.k_norm
    kv_scales,  # [2, kv_heads] f32, if layout.scaled
    layer,
    eps,
    token_stride,
    block_stride,
    layout: tl.constexpr,
):
    """One program: some heads of one token, all queries or all keys or all values. Queries come first along axis 1."""
    query_blocks: tl.constexpr = (layout.query_heads + layout.heads - 1) // layout.heads
    key_blocks: tl.constexpr = (layout.kv_heads + layout.heads - 1) // layout.heads
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = qkv + token * token_stride
    lanes = tl.arange(0, layout.heads)
    slot = tl.load(slots + token)
    table = cos_sin + tl.load(positions + token) * (2 * layout.half)
    if part < query_blocks:
        head = part * layout.heads + lanes
        ok = head < layout.query_heads
        at = head * layout.head_dim
        lower, upper, rest = _load_heads(row, at, ok, layout)
        if layout.q_norm:
            lower, upper, rest = _normalize(lower, upper, rest, q_norm, eps, layout)
        lower, upper = _rotate(lower, upper, table, layout)
        _store_heads(row, at, ok, lower, upper, rest, layout)
    else:
        side = (part - query_blocks) // key_blocks
        head = (part - query_blocks) % key_blocks * layout.heads + lanes
        ok = (head < layout.kv_heads) & (slot >= 0)
        lower, upper, rest = _load_heads(
            row, (layout.query_heads + side * layout.kv_heads + head) * layout.head_dim, ok, layout
        )
        if side == 0:
            if layout.k_norm:
                lower, upper, rest = _normalize(lower, upper, rest, k_norm, eps, layout)
            lower, upper = _rotate(lower, upper, table, layout)
        if layout.scaled:
            scale = tl.load(kv_scales + side * layout.kv_heads + head, mask=ok, other=1.0)[:, None]
            lower, upper, rest = lower / scale, upper / scale, rest / scale
        head_elements: tl.constexpr = layout.block_tokens * layout.head_dim
        base = (
            pool
            + slot // layout.block_tokens * block_stride
            + (layer.to(tl.int64) * 2 + side) * (layout.kv_heads * head_elements)
            + slot % layout.block_tokens * layout.head_dim
        )
        _store_heads(base, head * head_elements, ok, lower, upper, rest, layout)


@triton.jit
def _load_heads(base, at, ok, layout: tl.constexpr):
    """Both rotated halves and the rest of each head, in float32; heads start at ``at``."""
    i = tl.arange(0, layout.padded_half)
    mask = ok[:, None] & (i < layout.half)[None, :]
    lower = tl.load(base + at[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
    upper = tl.load(base + at[:, None] + layout.half + i[None, :], mask=mask, other=0.0).to(tl.float32)
    rest = lower
    if layout.rest > 0:
        j = tl.arange(0, layout.padded_rest)
        mask = ok[:, None] & (j < layout.rest)[None, :]
        rest = tl.load(base + at[:, None] + 2 * layout.half + j[None, :], mask=mask, other=0.0).to(tl.float32)
    return lower, upper, rest


@triton.jit
def _store_heads(base, at, ok, lower, upper, rest, layout: tl.constexpr):
    """Opposite of _load_heads, in the dtype behind base."""
    dtype: tl.constexpr = base.dtype.element_ty
    i = tl.arange(0, layout.padded_half)
    mask = ok[:, None] & (i < layout.half)[None, :]
    tl.store(base + at[:, None] + i[None, :], encode(lower, dtype, layout.interpreted), mask=mask)
    tl.store(base + at[:, None] + layout.half + i[None, :], encode(upper, dtype, layout.interpreted), mask=mask)
    if layout.rest > 0:
        j = tl.arange(0, layout.padded_rest)
        mask = ok[:, None] & (j < layout.rest)[None, :]
        tl.store(base + at[:, None] + 2 * layout.half + j[None, :], encode(rest, dtype, layout.interpreted), mask=mask)


@triton.jit
def _normalize(lower, upper, rest, weight, eps, layout: tl.constexpr):
    """RMS norm over the whole head: ``weight * x / sqrt(mean(x^2) + eps)``."""
    i = tl.arange(0, layout.padded_half)
    inside = i < layout.half
    squares = tl.sum(lower * lower, 1) + tl.sum(upper * upper, 1)
    if layout.rest > 0:
        squares += tl.sum(rest * rest, 1)
    scale = tl.rsqrt(squares / layout.head_dim + eps)[:, None]
    lower = lower * scale * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    upper = upper * scale * tl.load(weight + layout.half + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    if layout.rest > 0:
        j = tl.arange(0, layout.padded_rest)
        tail = tl.load(weight + 2 * layout.half + j, mask=j < layout.rest, other=0.0).to(tl.float32)
        rest = rest * scale * tail[None, :]
    return lower, upper, rest


@triton.jit
def _rotate(lower, upper, table, layout: tl.constexpr):
    """RoFormer (Su et al. 2021), section 3.4.2, with channel i paired to i + half."""
    i = tl.arange(0, layout.padded_half)
    cos = tl.load(table + i, mask=i < layout.half, other=1.0)[None, :]
    sin = tl.load(table + layout.half + i, mask=i < layout.half, other=0.0)[None, :]
    return lower * cos - upper * sin, upper * cos + lower * sin
