"""Chunked prefill over paged KV on the CPU."""

import torch
from torch import Tensor

from spillway.kernels.cpu.attention_call import (
    Batch,
    attention_arguments,
    check_ids,
    shape_of,
    targets,
)
from spillway.kernels.cpu.attention_layout import PREFILL_ROWS, Scratch
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.errors import KernelShapeError
from spillway.kernels.params import AttentionParams


def check_starts(query_starts: Tensor, sequences: int) -> None:
    """Check the rows' starts ``[S + 1]``.

    Raises:
        KernelShapeError: another shape or dtype.
    """
    if query_starts.shape != (sequences + 1,) or query_starts.dtype != torch.int32 or not query_starts.is_contiguous():
        raise KernelShapeError(
            f"query_starts must be int32 [{sequences + 1}], got {query_starts.dtype} {tuple(query_starts.shape)}"
        )


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
    sequences = context_lens.numel()
    shape = shape_of(q, pool, layer)
    check_ids(block_tables, context_lens, sequences)
    check_starts(query_starts, sequences)
    out, target = targets(q, out, lse)
    scratch = Scratch.plan(PREFILL_ROWS, shape.padded_dim)
    tasks = sequences * shape.kv_heads * (-(-q.shape[0] * shape.q_heads // (shape.kv_heads * PREFILL_ROWS)) + 1)
    threads = min(torch.get_num_threads(), tasks)
    batch = Batch(block_tables, query_starts.data_ptr(), context_lens)
    arguments = attention_arguments(q, pool, layer, shape, params, batch, target, scratch, threads)
    kernel("flash_prefill").run(arguments, threads)
    return out
