"""Turns tensors into the arguments of the attention kernels: checks, addresses, strides."""

import ctypes
import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from spillway.kernels.cpu.attention_layout import (
    ARGUMENTS,
    BLOCK_TOKENS_LIMIT,
    FACTOR,
    SOFT_CAP,
    Scratch,
)
from spillway.kernels.cpu.formats import FORMAT_OF, ITEM_BYTES
from spillway.kernels.cpu.launch import scratch_address
from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.params import AttentionParams

_LOG2_E = 1.4426950408889634
_PACK = struct.Struct("".join("d" if n in (FACTOR, SOFT_CAP) else "q" for n in range(ARGUMENTS)))
Arguments = ctypes.c_int64 * ARGUMENTS


@dataclass(frozen=True, slots=True)
class Shape:
    """What one model's layers have in common: everything that follows from the shapes of q and the pool."""

    q_heads: int
    kv_heads: int
    head_dim: int
    padded_dim: int
    q_format: int
    layers: int
    layer_bytes: int
    fixed: tuple[int, ...]  # arguments POOL_FORMAT ... BLOCK_SHIFT


@lru_cache(maxsize=256)
def _shape(q_heads: int, head_dim: int, q_dtype: torch.dtype, pool_shape: torch.Size, pool_dtype: torch.dtype) -> Shape:
    if len(pool_shape) != 6 or pool_shape[2] != 2:
        raise KernelShapeError(
            f"a pool is [blocks, layers, 2, kv_heads, block_tokens, head_dim], got {tuple(pool_shape)}"
        )
    _, layers, _, kv_heads, block_tokens, pool_dim = pool_shape
    q_format, pool_format = FORMAT_OF.get(q_dtype, -1), FORMAT_OF.get(pool_dtype, -1)
    if pool_format < 0:
        raise KernelDtypeError(f"no attention over a pool of {pool_dtype}")
    if not 0 <= q_format <= 2:
        raise KernelDtypeError(f"queries are float32, bfloat16 or float16, got {q_dtype}")
    if head_dim != pool_dim:
        raise KernelShapeError(f"head_dim of q is {head_dim}, of the pool {pool_dim}")
    if kv_heads == 0 or q_heads % kv_heads:
        raise KernelShapeError(f"{q_heads} query heads do not divide among {kv_heads} kv heads")
    if block_tokens & (block_tokens - 1) or not 1 <= block_tokens <= BLOCK_TOKENS_LIMIT:
        raise KernelShapeError(f"block_tokens must be a power of two up to {BLOCK_TOKENS_LIMIT}, got {block_tokens}")
    token_bytes = head_dim * ITEM_BYTES[pool_format]
    head_bytes = token_bytes * block_tokens
    layer_bytes = 2 * kv_heads * head_bytes
    fixed = (pool_format, layers * layer_bytes, head_bytes, token_bytes, block_tokens.bit_length() - 1)
    return Shape(q_heads, kv_heads, head_dim, -(-head_dim // 16) * 16, q_format, layers, layer_bytes, fixed)


def shape_of(q: Tensor, pool: Tensor, layer: int) -> Shape:
    """Check q ``[rows, heads, head_dim]``, the pool and the layer against one another.

    Raises:
        KernelShapeError, KernelDtypeError: they do not fit.
    """
    if q.dim() != 3 or not pool.is_contiguous():
        raise KernelShapeError(f"q must be [rows, heads, head_dim] and the pool contiguous, got {tuple(q.shape)}")
    _, q_heads, head_dim = q.shape
    shape = _shape(q_heads, head_dim, q.dtype, pool.shape, pool.dtype)
    if not 0 <= layer < shape.layers:
        raise KernelShapeError(f"layer {layer} of a pool of {shape.layers}")
    return shape


def check_rows(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, row: int) -> int:
    """Check a tensor ``[n, ...]`` whose rows are ``row`` contiguous numbers; returns the bytes between rows.

    Raises:
        KernelShapeError, KernelDtypeError: it is another shape, or its rows are scattered.
    """
    if tensor.shape != shape:
        raise KernelShapeError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise KernelDtypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.is_contiguous():
        return row * tensor.element_size()
    strides = tensor.stride()
    if strides[-1] != 1 or (len(strides) == 3 and shape[1] > 1 and strides[1] != shape[2]):
        raise KernelShapeError(f"heads and channels of {name} must be contiguous, got strides {strides}")
    return strides[0] * tensor.element_size()


def check_ids(block_tables: Tensor, context_lens: Tensor, sequences: int) -> None:
    """Check block tables ``[S, n]`` and context lengths ``[S]``.

    Raises:
        KernelShapeError, KernelDtypeError: they do not fit.
    """
    if block_tables.dtype != torch.int32 or context_lens.dtype != torch.int32:
        raise KernelDtypeError(f"block tables and context lengths are int32, got {block_tables.dtype}")
    if (
        block_tables.dim() != 2
        or len(block_tables) != sequences
        or (block_tables.stride(1) != 1 < block_tables.size(1))
    ):
        raise KernelShapeError(f"block_tables must be [{sequences}, n] by rows, got {tuple(block_tables.shape)}")
    if context_lens.shape != (sequences,) or not context_lens.is_contiguous():
        raise KernelShapeError(f"context_lens must be [{sequences}], got {tuple(context_lens.shape)}")


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments that say which rows attend to what."""

    block_tables: Tensor
    starts: int  # address of query_starts, 0 for decode
    context_lens: Tensor


@dataclass(frozen=True, slots=True)
class Decode:
    """The arguments that only decode has: how spans are shared out."""

    spans: int = 0
    parts: int = 1
    shared_tokens: int = 0
    state_bytes: int = 0  # of one span of one sequence


@dataclass(frozen=True, slots=True)
class Target:
    """Where results go; addresses, 0 for none."""

    out: int = 0
    out_stride: int = 0
    lse: int = 0
    lse_stride: int = 0
    sums: int = 0
    sums_stride: int = 0


def targets(q: Tensor, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Target]:
    """The output tensor, made if none was given, and the addresses to write to."""
    _, heads, channels = q.shape
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    out_stride = check_rows("out", out, q.shape, q.dtype, heads * channels)
    if lse is None:
        return out, Target(out.data_ptr(), out_stride)
    lse_stride = check_rows("lse", lse, q.shape[:2], torch.float32, heads)
    return out, Target(out.data_ptr(), out_stride, lse.data_ptr(), lse_stride)


def attention_arguments(
    q: Tensor,
    pool: Tensor,
    layer: int,
    shape: Shape,
    params: AttentionParams,
    batch: Batch,
    target: Target,
    scratch: Scratch,
    threads: int,
    decode: Decode = Decode(),
) -> "ctypes.Array[ctypes.c_int64]":
    """One block of arguments, see `attention_layout`; what the addresses point to must outlive the run."""
    group = shape.q_heads // shape.kv_heads
    if params.soft_cap is None:
        factor, soft_cap = params.scale * _LOG2_E, 0.0
    else:
        factor, soft_cap = params.scale * 2 * _LOG2_E / params.soft_cap, params.soft_cap * _LOG2_E
    sequences = batch.context_lens.shape[0]
    counters = -(-sequences * decode.parts * 8 // 64) * 64
    states = -(-sequences * decode.spans * decode.state_bytes // 64) * 64
    base = scratch_address(counters + states + threads * scratch.size_bytes)
    ctypes.memset(base, 0, counters)
    keys = pool.data_ptr() + layer * shape.layer_bytes
    arguments = Arguments()
    _PACK.pack_into(
        arguments,
        0,
        0,
        0,
        base + counters + states,
        scratch.size_bytes,
        q.data_ptr(),
        check_rows("q", q, q.shape, q.dtype, shape.q_heads * shape.head_dim),
        shape.q_format,
        target.out,
        target.out_stride,
        target.lse,
        target.lse_stride,
        keys,
        keys + shape.layer_bytes // 2,
        *shape.fixed,
        batch.block_tables.data_ptr(),
        batch.block_tables.stride(0) * 4,
        batch.starts,
        batch.context_lens.data_ptr(),
        sequences,
        shape.kv_heads,
        group,
        shape.head_dim,
        shape.padded_dim,
        params.causal,
        params.window or 0,
        0 if params.window is None else params.sinks,
        _per_head("alibi_slopes", params.alibi_slopes, shape.q_heads),
        _per_head("kv_scales", params.kv_scales, 2 * shape.kv_heads),
        factor,
        soft_cap,
        scratch.rows,
        base + counters,
        decode.spans,
        base,
        decode.parts,
        decode.shared_tokens,
        target.sums,
        target.sums_stride,
        *scratch.offsets,
    )
    return arguments


def _per_head(name: str, values: Tensor | None, count: int) -> int:
    if values is None:
        return 0
    if values.numel() != count or not values.is_contiguous():
        raise KernelShapeError(f"{name} must be {count} contiguous numbers, got {tuple(values.shape)}")
    return values.data_ptr()
