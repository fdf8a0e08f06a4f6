"""Attention of chunks of queries over paged KV: all sequences of a step in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.layout import Batch, check_tables, layout_of, result_like, scalars_of
from spillway.kernels.ops.tiles import FLOOR, LN2, LOG2_E, attend_tile, finish_rows, head_bases, narrow, row_mask
from spillway.kernels.params import AttentionParams
from spillway.kernels.tuning.tables import prefill_tile


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
    layout = layout_of(q, pool, params)
    check_tables(block_tables, context_lens, query_starts)
    out = result_like(q, out, lse)
    batch = Batch(q, pool, layer, block_tables, context_lens, params)
    scalars = scalars_of(params)
    tile = prefill_tile(q.device, layout.tile_key, layout.group, rows_wanted=q.shape[0] * layout.group)
    sequences = context_lens.shape[0]
    tokens_per_tile = tile.rows // layout.group
    # Every sequence needs at most this many tiles more than its share of full ones, so no length is read by the host.
    tiles = q.shape[0] // tokens_per_tile + sequences if q.shape[0] else 0
    launch(
        _flash_prefill_kernel,
        (tiles, layout.kv_heads, 1),
        q,
        out,
        lse if lse is not None else out,
        q,
        pool,
        block_tables,
        query_starts,
        context_lens,
        batch.alibi_slopes,
        batch.kv_scales,
        layer,
        sequences,
        q.stride(0),
        out.stride(0),
        block_tables.stride(0),
        batch.rows_per_block,
        scalars.window,
        scalars.sinks,
        scalars.factor,
        scalars.cap,
        layout=layout,
        rows=tile.rows,
        keys=tile.keys,
        write_lse=lse is not None,
        num_warps=tile.warps,
        num_stages=tile.num_stages,
    )
    return out


@triton.jit
def attend_range(
    acc, m, den, q, k_base, v_base, table, begin, end, first_position, last_position, positions, slopes,
    rows_per_block, window, sinks, factor, cap, layout: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """Fold keys ``[begin, end)`` into (acc, m, l), with masks only where a tile needs them.

    A tile needs none if the tile's first row sees all of it (causal) and its last row does too (window): between the
    left edge, where the window starts, and the diagonal on the right. Rows stand at positions first to last.
    """
    left, right = begin, end // keys * keys
    if layout.causal:
        right = tl.minimum(right, (first_position + 1) // keys * keys)
    if layout.window:
        left = tl.maximum(begin, (last_position - window + keys) // keys * keys)
        left = tl.minimum(left, tl.cdiv(end, keys) * keys)
        for start in range(begin, tl.minimum(left, end), keys):
            acc, m, den = attend_tile(
                acc, m, den, q, k_base, v_base, table, start, end, positions, slopes,
                rows_per_block, window, sinks, factor, cap, layout, keys, True, False,
            )  # fmt: skip
    right = tl.maximum(right, left)
    for start in range(left, right, keys):
        acc, m, den = attend_tile(
            acc, m, den, q, k_base, v_base, table, start, end, positions, slopes,
            rows_per_block, window, sinks, factor, cap, layout, keys, False, False,
        )  # fmt: skip
    for start in range(right, end, keys):
        acc, m, den = attend_tile(
            acc, m, den, q, k_base, v_base, table, start, end, positions, slopes,
            rows_per_block, window, sinks, factor, cap, layout, keys, True, False,
        )  # fmt: skip
    return acc, m, den


@triton.jit
def find_sequence(query_starts, tile, sequences, tokens_per_tile: tl.constexpr):
    """Which sequence a tile of the launch belongs to: the last whose first tile is not after it.

    Sequence s starts at tile ``query_starts[s] // tokens_per_tile + s``: never less than what those before it need.
    """
    low, high = 0, sequences
    while low < high:
        middle = (low + high) // 2
        first_tile = tl.load(query_starts + middle) // tokens_per_tile + middle
        if first_tile <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["layer", "sequences", "table_stride", "rows_per_block", "window", "sinks"])
def _flash_prefill_kernel(
    out,  # [T, query_heads, head_dim]
    lse,  # [T, query_heads] f32, if write_lse
    q,  # [T, query_heads, head_dim]
    pool,  # [blocks, layers, 2, kv_heads, block_tokens, head_dim]
    block_tables,  # [S, table_stride] i32
    query_starts,  # [S + 1] i32
    context_lens,  # [S] i32
    alibi_slopes,  # [query_heads] f32, if layout.alibi
    kv_scales,  # [2, kv_heads] f32, if layout.kv_scales
    layer,
    sequences,  # S
    q_stride,  # elements from token to token
    out_stride,
    table_stride,
    rows_per_block,
    window,
    sinks,
    factor,
    cap,
    layout: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
    write_lse: tl.constexpr,
):
    """One program: ``rows // group`` tokens of one sequence times the query heads of one kv head.

    Tiles are numbered backwards: late tokens of a causal chunk see most keys, and the longest work should start first.
    Neighbouring programs share a kv head, so its keys are read from L2.
    """
    tokens_per_tile: tl.constexpr = rows // layout.group
    dim: tl.constexpr = layout.padded_dim
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = find_sequence(query_starts, tile, sequences, tokens_per_tile)
    query_start = tl.load(query_starts + sequence)
    chunk = tl.load(query_starts + sequence + 1) - query_start
    context = tl.load(context_lens + sequence)
    first = (tile - query_start // tokens_per_tile - sequence) * tokens_per_tile
    if first >= chunk:
        return

    r = tl.arange(0, rows)
    d = tl.arange(0, layout.padded_dim)
    token = first + r // layout.group
    head = kv_head * layout.group + r % layout.group
    ok = (token < chunk) & (r < tokens_per_tile * layout.group)
    row = (query_start + token).to(tl.int64)
    q_tile = tl.load(
        q + (row * q_stride + head * layout.head_dim)[:, None] + d[None, :], mask=row_mask(ok, d, layout), other=0.0
    ).to(layout.operand)
    positions = context - chunk + token
    slopes = positions
    if layout.alibi:
        slopes = tl.load(alibi_slopes + head, mask=ok, other=0.0) * LOG2_E
    if layout.kv_scales:
        factor = factor * tl.load(kv_scales + kv_head)

    first_position = context - chunk + first
    last_position = tl.minimum(first_position + tokens_per_tile, context) - 1
    end = last_position + 1 if layout.causal else context
    k_base, v_base = head_bases(pool, layer, kv_head, layout)
    table = block_tables + sequence.to(tl.int64) * table_stride

    m = tl.full([rows], FLOOR, tl.float32)
    den = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, dim], tl.float32)
    begin = 0
    if layout.window:
        begin = tl.maximum(first_position - window + 1, 0) // keys * keys
        if layout.sinks:
            sinks_end = tl.minimum(sinks, begin)
            for start in range(0, sinks_end, keys):
                acc, m, den = attend_tile(
                    acc, m, den, q_tile, k_base, v_base, table, start, sinks_end, positions, slopes,
                    rows_per_block, window, sinks, factor, cap, layout, keys, True, False,
                )  # fmt: skip
    acc, m, den = attend_range(
        acc, m, den, q_tile, k_base, v_base, table, begin, end, first_position, last_position, positions, slopes,
        rows_per_block, window, sinks, factor, cap, layout, keys,
    )  # fmt: skip
    acc, log2_sum = finish_rows(acc, m, den)
    if layout.kv_scales:
        acc = acc * tl.load(kv_scales + layout.kv_heads + kv_head)
    tl.store(
        out + (row * out_stride + head * layout.head_dim)[:, None] + d[None, :],
        narrow(acc, out.dtype.element_ty, layout.interpreted),
        mask=row_mask(ok, d, layout),
    )
    if write_lse:
        tl.store(lse + row * layout.query_heads + head, log2_sum * LN2, mask=ok)
