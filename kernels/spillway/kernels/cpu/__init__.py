"""The CPU ops. What the compiled kernels do not take computes its definition in float64 and rounds once."""

import torch

from spillway.kernels.cpu.elementwise import rms_norm, silu_mul
from spillway.kernels.cpu.flash_prefill import flash_prefill
from spillway.kernels.cpu.paged_decode import cascade_decode, paged_decode
from spillway.kernels.cpu.write_kv import rope_write_kv, write_kv
from spillway.kernels.reference import attention


def _finish(result, like, out, lse):
    values, sums = result
    out = torch.empty(like.shape, dtype=like.dtype) if out is None else out
    out.copy_(values)
    if lse is not None:
        lse.copy_(sums)
    return out


def merge_states(out_a, lse_a, out_b, lse_b, *, out=None, lse=None):
    values, sums = attention.merge_states(out_a, lse_a, out_b, lse_b)
    out = torch.empty_like(out_a) if out is None else out
    lse = torch.empty_like(lse_a) if lse is None else lse
    return out.copy_(values), lse.copy_(sums)


def score_sums(q, pool, layer, block_tables, query_starts, context_lens, lse, params, sums):
    return sums.copy_(attention.score_sums(q, pool, layer, block_tables, query_starts, context_lens, params, sums))


def copy_blocks(pool, src, dst):
    pool[dst] = pool[src]


def gather_blocks(pool, ids, staging):
    torch.index_select(pool.flatten(1), 0, ids, out=staging.view(ids.shape[0], -1))


def scatter_blocks(pool, ids, staging):
    pool.flatten(1)[ids] = staging.view(ids.shape[0], -1)
