"""One query per sequence over paged KV on the CPU, plain and with a shared prefix."""

import torch
from torch import Tensor

from spillway.kernels.cpu.attention_call import (
    Batch,
    Decode,
    Shape,
    attention_arguments,
    check_ids,
    shape_of,
    targets,
)
from spillway.kernels.cpu.attention_layout import CHUNK, PREFILL_ROWS, SPAN, Scratch, state_floats
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.errors import KernelShapeError, KernelValueError
from spillway.kernels.params import AttentionParams


def paged_decode(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    params: AttentionParams,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """See `spillway.kernels.paged_decode`."""
    shape = shape_of(q, pool, layer)
    check_ids(block_tables, context_lens, q.shape[0])
    threads = torch.get_num_threads()
    decode = _plan(block_tables, context_lens, shape, pool.shape[4], threads, 0)
    out, target = targets(q, out, lse)
    scratch = Scratch.plan(shape.q_heads, shape.padded_dim)
    batch = Batch(block_tables, 0, context_lens)
    threads = min(threads, q.shape[0] * decode.spans * decode.parts)
    arguments = attention_arguments(q, pool, layer, shape, params, batch, target, scratch, threads, decode)
    kernel("paged_decode").run(arguments, threads)
    return out


def cascade_decode(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    shared_tokens: int,
    params: AttentionParams,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """See `spillway.kernels.cascade_decode`: bit for bit what `paged_decode` gives.

    The prefix is shared up to its last whole chunk of 128 tokens, the rest is read by each sequence.
    """
    shape = shape_of(q, pool, layer)
    check_ids(block_tables, context_lens, q.shape[0])
    if q.shape[0] == 0:
        return targets(q, out, lse)[0]
    shortest = int(context_lens.min())
    if not 0 <= shared_tokens <= shortest:
        raise KernelValueError(f"{shared_tokens} shared tokens, but a context of {shortest}")
    if shared_tokens % pool.shape[4]:
        raise KernelShapeError(f"{shared_tokens} shared tokens are not whole blocks of {pool.shape[4]}")
    shared = min(shared_tokens, shortest - 1) // CHUNK * CHUNK
    if shared <= 0:
        return paged_decode(q, pool, layer, block_tables, context_lens, params, out=out, lse=lse)
    threads = torch.get_num_threads()
    decode = _plan(block_tables, context_lens, shape, pool.shape[4], threads, shared)
    out, target = targets(q, out, lse)
    scratch = Scratch.plan(max(shape.q_heads, PREFILL_ROWS), shape.padded_dim)
    batch = Batch(block_tables, 0, context_lens)
    # both runs keep the spans' states in the same place of this thread's scratch
    for name in ("cascade_shared", "paged_decode"):
        arguments = attention_arguments(q, pool, layer, shape, params, batch, target, scratch, threads, decode)
        kernel(name).run(arguments, threads)
    return out


def _plan(
    block_tables: Tensor, context_lens: Tensor, shape: Shape, block_tokens: int, threads: int, shared_tokens: int
) -> Decode:
    """Room for every span the tables can hold; heads shared out where spans alone would leave threads idle."""
    spans = max(-(-block_tables.shape[1] * block_tokens // SPAN), 1)
    parts = 1
    sequences = context_lens.shape[0]
    if 0 < sequences < 2 * threads:
        tasks = sum(max(-(-(context - shared_tokens) // SPAN), 1) for context in context_lens.tolist())
        parts = min(shape.kv_heads, max(-(-2 * threads // tasks), 1))
    return Decode(spans, parts, shared_tokens, 4 * state_floats(shape.q_heads, shape.padded_dim))
