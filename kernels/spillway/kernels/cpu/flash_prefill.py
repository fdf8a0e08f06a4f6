"""Chunked prefill over paged KV on the CPU."""

import torch
from torch import Tensor

from spillway.kernels.cpu.attention_call import Call, Work, attention_arguments, plan_of
from spillway.kernels.cpu.attention_layout import PREFILL_ROWS
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.errors import KernelShapeError
from spillway.kernels.params import AttentionParams


def check_starts(query_starts: Tensor, sequences: int) -> int:
    """Address of the rows' starts ``[S + 1]``.

    Raises:
        KernelShapeError: another shape or dtype.
    """
    if query_starts.dtype is not torch.int32 or query_starts.shape != (sequences + 1,):
        raise KernelShapeError(
            f"query_starts must be int32 [{sequences + 1}], got {query_starts.dtype} {tuple(query_starts.shape)}"
        )
    if not query_starts.is_contiguous():
        raise KernelShapeError("query_starts must be contiguous")
    return query_starts.data_ptr()


def flash_prefill(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    params: AttentionParams,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """See `spillway.kernels.flash_prefill`."""
    plan = plan_of(q, pool, params, True)
    sequences = context_lens.numel()
    tiles = q.size(0) * (plan.q_heads // plan.kv_heads) // PREFILL_ROWS + sequences
    work = Work(min(torch.get_num_threads(), tiles * plan.kv_heads), check_starts(query_starts, sequences))
    call = Call(q, pool, layer, block_tables, context_lens, params, out, lse)
    out, arguments = attention_arguments(call, plan, work)
    kernel("flash_prefill").run(arguments, work.threads)
    return out
