"""The CPU ops. What the compiled kernels do not take computes its definition in float64 and rounds once."""

import torch

from spillway.kernels.cpu import elementwise
from spillway.kernels.cpu.flash_prefill import flash_prefill
from spillway.kernels.cpu.paged_decode import cascade_decode, paged_decode
from spillway.kernels.reference import attention, fused


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


def write_kv(k, v, pool, layer, slots, *, kv_scales=None):
    block_tokens = pool.shape[4]
    keep = (slots >= 0).nonzero()[:, 0]
    block, offset = slots[keep] // block_tokens, slots[keep] % block_tokens
    k, v = k[keep], v[keep]
    if kv_scales is not None:
        k, v = k.float() / kv_scales[0][:, None], v.float() / kv_scales[1][:, None]
    pool[block, layer, 0, :, offset] = k.to(pool.dtype)
    pool[block, layer, 1, :, offset] = v.to(pool.dtype)


def rope_write_kv(qkv, cos_sin, positions, pool, layer, slots, *, q_norm=None, k_norm=None, eps=1e-6, kv_scales=None):
    norms = (q_norm, k_norm)
    if kv_scales is None and elementwise.rope_write_kv(qkv, cos_sin, positions, pool, layer, slots, norms, eps):
        return
    kv_heads, head_dim = pool.shape[3], pool.shape[5]
    q, k, v = fused.rope_qkv(qkv, cos_sin, positions, kv_heads, head_dim, norms, eps)
    write_kv(k, v, pool, layer, slots, kv_scales=kv_scales)
    qkv.unflatten(-1, (-1, head_dim))[:, : q.shape[1]] = q.to(qkv.dtype)


def rms_norm(x, weight, eps, *, residual=None, out=None):
    out = torch.empty_like(x) if out is None else out
    if elementwise.rms_norm(x, weight, eps, residual, out):
        return out
    values, added = fused.rms_norm(x, weight, eps, residual)
    if residual is not None:
        residual.copy_(added)
    return out.copy_(values)


def silu_mul(gate_up, *, out=None):
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2) if out is None else out
    return out if elementwise.silu_mul(gate_up, out) else out.copy_(fused.silu_mul(gate_up))


def copy_blocks(pool, src, dst):
    pool[dst] = pool[src]


def gather_blocks(pool, ids, staging):
    torch.index_select(pool.flatten(1), 0, ids, out=staging.view(ids.shape[0], -1))


def scatter_blocks(pool, ids, staging):
    pool.flatten(1)[ids] = staging.view(ids.shape[0], -1)
