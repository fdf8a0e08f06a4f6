"""How much attention each cached token received: column sums of the softmax, for eviction by importance."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.layout import Batch, check_tables, layout_of, scalars_of
from spillway.kernels.ops.tiles import LOG2_E, head_bases, key_offsets, load_tile, row_mask, score_tile, visible
from spillway.kernels.params import AttentionParams
from spillway.kernels.tuning.tables import prefill_tile


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
    layout = layout_of(q, pool, params)
    check_tables(block_tables, context_lens, query_starts)
    sequences = context_lens.shape[0]
    if lse.shape != q.shape[:2] or not lse.is_contiguous():
        raise KernelShapeError(f"lse must be contiguous {tuple(q.shape[:2])}, got {tuple(lse.shape)}")
    if sums.dim() != 3 or sums.shape[:2] != (sequences, layout.kv_heads) or not sums.is_contiguous():
        raise KernelShapeError(f"sums must be contiguous [{sequences}, {layout.kv_heads}, tokens], got {sums.shape}")
    for tensor in (lse, sums):
        if tensor.dtype is not torch.float32:
            raise KernelDtypeError(f"lse and sums are float32, got {tensor.dtype}")
    batch = Batch(q, pool, layer, block_tables, context_lens, params)
    scalars = scalars_of(params)
    tile = prefill_tile(q.device, layout.tile_key, layout.group, rows_wanted=1)
    launch(
        _score_sums_kernel,
        (-(-sums.shape[2] // tile.keys), layout.kv_heads, sequences),
        q,
        sums,
        q,
        pool,
        block_tables,
        query_starts,
        context_lens,
        lse,
        batch.alibi_slopes,
        batch.kv_scales,
        layer,
        q.stride(0),
        block_tables.stride(0),
        batch.rows_per_block,
        sums.shape[2],
        scalars.window,
        scalars.sinks,
        scalars.factor,
        scalars.cap,
        layout=layout,
        rows=tile.rows,
        keys=tile.keys,
        num_warps=tile.warps,
        num_stages=2,
    )
    return sums


@triton.jit(do_not_specialize=["layer", "table_stride", "rows_per_block", "columns", "window", "sinks"])
def _score_sums_kernel(
    sums,  # [S, kv_heads, columns] f32
    q,  # [T, query_heads, head_dim]
    pool,  # [blocks, layers, 2, kv_heads, block_tokens, head_dim]
    block_tables,  # [S, table_stride] i32
    query_starts,  # [S + 1] i32
    context_lens,  # [S] i32
    lse,  # [T, query_heads] f32, natural
    alibi_slopes,  # [query_heads] f32, if layout.alibi
    kv_scales,  # [2, kv_heads] f32, if layout.kv_scales
    layer,
    q_stride,
    table_stride,
    rows_per_block,
    columns,
    window,
    sinks,
    factor,
    cap,
    layout: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
):
    """One program: one tile of keys of one sequence and kv head, against all rows of the chunk that may see it."""
    tokens_per_tile: tl.constexpr = rows // layout.group
    dim: tl.constexpr = layout.padded_dim
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.program_id(0) * keys
    context = tl.load(context_lens + sequence)
    if start >= context:
        return
    query_start = tl.load(query_starts + sequence)
    chunk = tl.load(query_starts + sequence + 1) - query_start
    if layout.kv_scales:
        factor = factor * tl.load(kv_scales + kv_head)

    d = tl.arange(0, dim)
    n = start + tl.arange(0, keys)
    held = n < context
    table = block_tables + sequence.to(tl.int64) * table_stride
    k_base, _ = head_bases(pool, layer, kv_head, layout)
    k = load_tile(k_base, key_offsets(table, n, held, d, rows_per_block, layout, True), held, d, layout, True)

    first = 0
    if layout.causal:  # rows before the tile's first key see none of it
        first = tl.maximum(start - (context - chunk), 0) // tokens_per_tile * tokens_per_tile
    r = tl.arange(0, rows)
    total = tl.zeros([rows, keys], tl.float32)
    for begin in range(first, chunk, tokens_per_tile):
        token = begin + r // layout.group
        head = kv_head * layout.group + r % layout.group
        ok = (token < chunk) & (r < tokens_per_tile * layout.group)
        row = (query_start + token).to(tl.int64)
        at = (row * q_stride + head * layout.head_dim)[:, None] + d[None, :]
        q_tile = tl.load(q + at, mask=row_mask(ok, d, layout), other=0.0).to(layout.operand)
        positions = context - chunk + token
        slopes = positions
        if layout.alibi:
            slopes = tl.load(alibi_slopes + head, mask=ok, other=0.0) * LOG2_E
        # A row without keys has -inf here and scores of -inf: +inf makes its share 0 instead of NaN.
        row_lse = tl.load(lse + row * layout.query_heads + head, mask=ok, other=float("inf")) * LOG2_E
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
        s = score_tile(q_tile, k, n, positions, slopes, factor, cap, layout)
        if not (layout.soft_cap or layout.alibi):
            s = s * factor
        keep = visible(n, held, positions, window, sinks, layout)
        total += tl.where(keep, tl.exp2(s - row_lse[:, None]), 0.0)
    at = (sequence.to(tl.int64) * layout.kv_heads + kv_head) * columns + n
    tl.store(sums + at, tl.load(sums + at, mask=held, other=0.0) + tl.sum(total, 0), mask=held)
