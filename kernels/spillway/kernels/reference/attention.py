"""Attention over paged KV, one sequence at a time, scores as whole matrices."""

import torch
from torch import Tensor

from spillway.kernels.params import AttentionParams


def gather_kv(pool: Tensor, layer: int, blocks: Tensor, tokens: int, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence as float64 ``[kv_heads, tokens, head_dim]``."""
    kv = pool[blocks.long(), layer].double()  # [blocks, 2, kv_heads, block_tokens, head_dim]
    if params.kv_scales is not None:
        kv = kv * params.kv_scales.double()[None, :, :, None, None]
    kv = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :tokens]
    return kv[0], kv[1]


def masked_scores(q: Tensor, k: Tensor, context: int, params: AttentionParams) -> Tensor:
    """Scores ``[query heads, rows, context]`` of the last rows of a context; -inf where a key is not visible."""
    rows, query_heads, _ = q.shape
    k = k.repeat_interleave(query_heads // k.shape[0], dim=0)
    scores = torch.einsum("qhd,hkd->hqk", q.double(), k) * params.scale
    if params.soft_cap is not None:
        scores = params.soft_cap * torch.tanh(scores / params.soft_cap)
    position = torch.arange(context - rows, context)[:, None]
    key = torch.arange(context)[None, :]
    if params.alibi_slopes is not None:
        scores = scores + params.alibi_slopes.double()[:, None, None] * (key - position)
    visible = torch.ones(rows, context, dtype=torch.bool)
    if params.causal:
        visible &= key <= position
    if params.window is not None:
        visible &= (key > position - params.window) | (key < params.sinks)
    return scores.masked_fill(~visible, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Output ``[rows, query heads, head_dim]`` and log-sum-exp ``[rows, query heads]`` of one sequence."""
    scores = masked_scores(q, k, k.shape[1], params)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None].clamp(min=torch.finfo(torch.float64).min))
    v = v.repeat_interleave(q.shape[1] // v.shape[0], dim=0)
    return torch.einsum("hqk,hkd->qhd", weights, v), lse.T


def flash_prefill(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """Output ``[T, query heads, head_dim]`` and log-sum-exp ``[T, query heads]``."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for sequence, context in enumerate(context_lens.tolist()):
        rows = slice(int(query_starts[sequence]), int(query_starts[sequence + 1]))
        if context > 0 and rows.stop > rows.start:
            blocks = block_tables[sequence, : -(-context // pool.shape[4])]
            k, v = gather_kv(pool, layer, blocks, context, params)
            out[rows], lse[rows] = attend(q[rows], k, v, params)
    return out, lse


def paged_decode(
    q: Tensor, pool: Tensor, layer: int, block_tables: Tensor, context_lens: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Output ``[S, query heads, head_dim]`` and log-sum-exp ``[S, query heads]``."""
    query_starts = torch.arange(q.shape[0] + 1)
    return flash_prefill(q, pool, layer, block_tables, query_starts, context_lens, params)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the union, by weights exp(lse)."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    floor = lse.clamp(min=torch.finfo(torch.float64).min)
    weight_a, weight_b = torch.exp(lse_a.double() - floor), torch.exp(lse_b.double() - floor)
    return out_a.double() * weight_a[..., None] + out_b.double() * weight_b[..., None], lse


def score_sums(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    params: AttentionParams,
    sums: Tensor,
) -> Tensor:
    """A new ``[S, kv_heads, tokens]``: sums plus the attention each cached token received."""
    sums = sums.double().clone()
    kv_heads = pool.shape[3]
    for sequence, context in enumerate(context_lens.tolist()):
        rows = slice(int(query_starts[sequence]), int(query_starts[sequence + 1]))
        if context == 0 or rows.stop == rows.start:
            continue
        k, _ = gather_kv(pool, layer, block_tables[sequence, : -(-context // pool.shape[4])], context, params)
        scores = masked_scores(q[rows], k, context, params)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        sums[sequence, :, :context] += weights.sum(dim=1).reshape(kv_heads, -1, context).sum(dim=1)
    return sums
