"""Attention paid to each cached token, on the CPU."""

import torch
from torch import Tensor

from spillway.kernels.cpu.attention_call import Call, Work, attention_arguments, plan_of
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.cpu.flash_prefill import check_starts
from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.params import AttentionParams


def score_sums(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    lse: Tensor,
    params: AttentionParams,
    sums: Tensor,
) -> Tensor:
    """See `spillway.kernels.score_sums`."""
    plan = plan_of(q, pool, params, True)
    sequences = context_lens.numel()
    if sums.dim() != 3 or sums.shape[:2] != (sequences, plan.kv_heads) or sums.stride(2) != 1:
        raise KernelShapeError(f"sums must be [{sequences}, {plan.kv_heads}, tokens], got {tuple(sums.shape)}")
    if sums.dtype is not torch.float32:
        raise KernelDtypeError(f"sums must be float32, got {sums.dtype}")
    if sequences and sums.shape[2] < int(context_lens.max()):
        raise KernelShapeError(f"sums have {sums.shape[2]} tokens, a context has {int(context_lens.max())}")
    work = Work(
        torch.get_num_threads(),
        check_starts(query_starts, sequences),
        sums=(sums.data_ptr(), sums.stride(1) * 4, sums.stride(0) * 4),
    )
    # the op has no output of its own: queries stand in for it and are not written
    _, arguments = attention_arguments(Call(q, pool, layer, block_tables, context_lens, params, q, lse), plan, work)
    kernel("score_sums").run(arguments, work.threads)
    return sums
