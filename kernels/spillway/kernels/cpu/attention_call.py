"""Turns tensors into the arguments of the attention kernels: checks, addresses, strides.

These ops run layers times steps, so what follows from shapes and settings alone is worked out once and kept as bytes.
"""

import ctypes
import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spillway.kernels.cpu.attention_layout import (
    ARGUMENTS,
    BLOCK_TOKENS_LIMIT,
    FACTOR,
    FIRST_FIXED,
    PREFILL_ROWS,
    SOFT_CAP,
    Scratch,
    state_floats,
)
from spillway.kernels.cpu.checks import check_layer, check_pool_shape, format_code, row_stride
from spillway.kernels.cpu.checks import check_rows as check_rows
from spillway.kernels.cpu.formats import ITEM_BYTES
from spillway.kernels.cpu.launch import Arguments, scratch_address
from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.params import AttentionParams

_LOG2_E = 1.4426950408889634
_VARYING = struct.Struct(f"{FIRST_FIXED}q")
_FIXED = struct.Struct("".join("d" if n in (FACTOR, SOFT_CAP) else "q" for n in range(FIRST_FIXED, ARGUMENTS)))
_BLOCK = ctypes.c_int64 * ARGUMENTS
_INT32, _FLOAT32 = torch.int32, torch.float32


class Call(NamedTuple):
    """The tensors of one call, as the op got them."""

    q: Tensor
    pool: Tensor
    layer: int
    block_tables: Tensor
    context_lens: Tensor
    params: AttentionParams
    out: Tensor | None
    lse: Tensor | None


class Work(NamedTuple):
    """How a call is shared out."""

    threads: int
    starts: int = 0  # address of query_starts; 0: one query per sequence
    spans: int = 0  # decode: room for this many spans per sequence
    parts: int = 1  # decode: tasks that share a span by key heads
    shared_tokens: int = 0  # cascade: done before, whole chunks
    sums: tuple[int, int, int] = (0, 0, 0)  # score_sums: address and strides


class Plan(NamedTuple):
    """What one model's layers have in common."""

    q_heads: int
    kv_heads: int
    head_dim: int
    layers: int
    layer_bytes: int
    scratch_bytes: int  # of one worker
    state_bytes: int  # of one span of one sequence
    fixed: bytes  # the arguments from FIRST_FIXED on


def plan_of(q: Tensor, pool: Tensor, params: AttentionParams, tiled: bool) -> Plan:
    """Check queries, pool and settings against one another; ``tiled`` for ops that take tiles of many rows.

    Raises:
        KernelShapeError, KernelDtypeError: they do not fit.
    """
    shape = q.shape
    if len(shape) != 3 or not pool.is_contiguous():
        raise KernelShapeError(f"q must be [rows, heads, head_dim] and the pool contiguous, got {tuple(shape)}")
    return _plan(shape[1], shape[2], q.dtype, pool.shape, pool.dtype, params, tiled)


@lru_cache(maxsize=512)
def _plan(
    q_heads: int,
    head_dim: int,
    q_dtype: torch.dtype,
    pool_shape: torch.Size,
    pool_dtype: torch.dtype,
    params: AttentionParams,
    tiled: bool,
) -> Plan:
    _, layers, _, kv_heads, block_tokens, pool_dim = check_pool_shape(pool_shape)
    q_format, pool_format = format_code("queries", q_dtype, 3), format_code("the pool", pool_dtype, 5)
    if head_dim != pool_dim:
        raise KernelShapeError(f"head_dim of q is {head_dim}, of the pool {pool_dim}")
    if q_heads % kv_heads:
        raise KernelShapeError(f"{q_heads} query heads do not divide among {kv_heads} kv heads")
    if block_tokens & (block_tokens - 1) or not 1 <= block_tokens <= BLOCK_TOKENS_LIMIT:
        raise KernelShapeError(f"block_tokens must be a power of two up to {BLOCK_TOKENS_LIMIT}, got {block_tokens}")
    token_bytes = head_dim * ITEM_BYTES[pool_format]
    head_bytes = token_bytes * block_tokens
    layer_bytes = 2 * kv_heads * head_bytes
    padded_dim = -(-head_dim // 16) * 16
    scratch = Scratch.plan(max(q_heads, PREFILL_ROWS) if tiled else q_heads, padded_dim)
    factor, soft_cap = params.scale * _LOG2_E, 0.0
    if params.soft_cap is not None:
        factor, soft_cap = 2 * factor / params.soft_cap, params.soft_cap * _LOG2_E
    fixed = _FIXED.pack(
        q_format,
        pool_format,
        layers * layer_bytes,
        head_bytes,
        token_bytes,
        block_tokens.bit_length() - 1,
        kv_heads,
        q_heads // kv_heads,
        head_dim,
        padded_dim,
        params.causal,
        params.window or 0,
        0 if params.window is None else params.sinks,
        _per_head("alibi_slopes", params.alibi_slopes, q_heads),
        _per_head("kv_scales", params.kv_scales, 2 * kv_heads),
        factor,
        soft_cap,
        scratch.rows,
        *scratch.offsets,
    )
    state_bytes = 4 * state_floats(q_heads, padded_dim)
    return Plan(q_heads, kv_heads, head_dim, layers, layer_bytes, scratch.size_bytes, state_bytes, fixed)


def _per_head(name: str, values: Tensor | None, count: int) -> int:
    if values is None:
        return 0
    if values.numel() != count or not values.is_contiguous() or values.device.type != "cpu":
        raise KernelShapeError(f"{name} must be {count} contiguous numbers on the CPU, got {tuple(values.shape)}")
    return values.data_ptr()


def _check_ids(block_tables: Tensor, context_lens: Tensor) -> None:
    if block_tables.dtype is not _INT32 or context_lens.dtype is not _INT32:
        raise KernelDtypeError(f"block tables and context lengths are int32, got {block_tables.dtype}")
    shape = block_tables.shape
    if len(shape) != 2 or context_lens.shape != shape[:1] or not context_lens.is_contiguous():
        raise KernelShapeError(
            f"block_tables must be [S, n] and context_lens [S], got {tuple(shape)} and {tuple(context_lens.shape)}"
        )
    if not block_tables.is_contiguous() and block_tables.stride(1) != 1:
        raise KernelShapeError(f"rows of block_tables must be contiguous, got strides {block_tables.stride()}")


def attention_arguments(call: Call, plan: Plan, work: Work) -> tuple[Tensor, Arguments]:
    """The output tensor, made if none was given, and one block of arguments (see `attention_layout`).

    All tensors of the call must outlive the run.

    Raises:
        KernelShapeError, KernelDtypeError: the tensors do not fit together.
    """
    q, pool, layer, block_tables, context_lens, _, out, lse = call
    _check_ids(block_tables, context_lens)
    check_layer(layer, plan.layers)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    elif out.shape != q.shape or out.dtype is not q.dtype:
        raise KernelShapeError(f"out must be {q.dtype} {tuple(q.shape)}, got {out.dtype} {tuple(out.shape)}")
    if lse is not None and (lse.shape != q.shape[:2] or lse.dtype is not _FLOAT32):
        raise KernelShapeError(f"lse must be float32 {tuple(q.shape[:2])}, got {lse.dtype} {tuple(lse.shape)}")
    sequences = block_tables.size(0)
    counters = (sequences * work.parts * 8 + 63) & -64
    states = (sequences * work.spans * plan.state_bytes + 63) & -64
    base = scratch_address(counters + states + work.threads * plan.scratch_bytes)
    if work.spans:
        ctypes.memset(base, 0, counters)
    keys = pool.data_ptr() + layer * plan.layer_bytes
    row = plan.q_heads * plan.head_dim
    arguments = _BLOCK()
    _VARYING.pack_into(
        arguments,
        0,
        0,
        0,
        base + counters + states,
        plan.scratch_bytes,
        q.data_ptr(),
        row_stride("q", q, row),
        out.data_ptr(),
        row_stride("out", out, row),
        0 if lse is None else lse.data_ptr(),
        0 if lse is None else row_stride("lse", lse, plan.q_heads),
        keys,
        keys + plan.layer_bytes // 2,
        block_tables.data_ptr(),
        block_tables.stride(0) * 4,
        work.starts,
        context_lens.data_ptr(),
        sequences,
        base + counters,
        work.spans,
        base,
        work.parts,
        work.shared_tokens,
        *work.sums,
    )
    ctypes.memmove(ctypes.addressof(arguments) + FIRST_FIXED * 8, plan.fixed, len(plan.fixed))
    return out, arguments
