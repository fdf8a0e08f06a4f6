"""One query per sequence over paged KV on the CPU, plain and with a shared prefix."""

import torch
from torch import Tensor

from spillway.kernels.cpu.attention_call import Call, Plan, Work, attention_arguments, plan_of
from spillway.kernels.cpu.attention_layout import CHUNK, SPAN
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
    plan = plan_of(q, pool, params, False)
    call = Call(q, pool, layer, block_tables, context_lens, params, out, lse)
    work = _share_out(call, plan, 0)
    out, arguments = attention_arguments(call, plan, work)
    kernel("paged_decode").run(arguments, work.threads)
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
    plan = plan_of(q, pool, params, True)
    call = Call(q, pool, layer, block_tables, context_lens, params, out, lse)
    shortest = int(context_lens.min()) if len(context_lens) else 0
    if not 0 <= shared_tokens <= shortest:
        raise KernelValueError(f"{shared_tokens} shared tokens, but a context of {shortest}")
    if shared_tokens % pool.shape[4]:
        raise KernelShapeError(f"{shared_tokens} shared tokens are not whole blocks of {pool.shape[4]}")
    shared = min(shared_tokens, shortest - 1) // CHUNK * CHUNK
    if shared <= 0:
        return paged_decode(q, pool, layer, block_tables, context_lens, params, out=out, lse=lse)
    work = _share_out(call, plan, shared)
    # both runs keep the spans' states in the same place of this thread's scratch
    out, arguments = attention_arguments(call, plan, work)
    kernel("cascade_shared").run(arguments, work.threads)
    arguments[0] = arguments[1] = 0  # tickets and workers count anew
    kernel("paged_decode").run(arguments, work.threads)
    return out


def _share_out(call: Call, plan: Plan, shared_tokens: int) -> Work:
    """Room for every span the tables can hold; heads shared out where spans alone would leave threads idle.

    Raises:
        KernelShapeError: not one query per sequence.
    """
    sequences, columns = call.block_tables.shape
    if call.q.size(0) != sequences:
        raise KernelShapeError(f"{call.q.size(0)} queries for {sequences} sequences")
    spans = max(-(-columns * call.pool.size(4) // SPAN), 1)
    threads, parts = torch.get_num_threads(), 1
    if 0 < sequences < 2 * threads and threads > 1:
        tasks = sum(max(-(-(context - shared_tokens) // SPAN), 1) for context in call.context_lens.tolist())
        parts = min(plan.kv_heads, max(-(-2 * threads // tasks), 1))
    return Work(threads, 0, spans, parts, shared_tokens)
