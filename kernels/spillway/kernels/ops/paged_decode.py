"""Attention of one query per sequence over paged KV, split over the whole GPU with a grid that never changes."""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.decode_split import most_spans, spans_within
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.layout import Batch, Layout, check_tables, layout_of, result_like, scalars_of
from spillway.kernels.ops.spans import (
    Parts,
    SpanPlan,
    first_visible,
    merge_spans,
    new_parts,
    span_tokens,
    visible_tokens,
)
from spillway.kernels.ops.tiles import FLOOR, LN2, LOG2_E, attend_tile, finish_rows, head_bases, narrow, row_mask
from spillway.kernels.params import AttentionParams
from spillway.kernels.tuning.gpu import gpu_of, power_of_two
from spillway.kernels.tuning.tables import decode_tile


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
    layout = layout_of(q, pool, params)
    check_tables(block_tables, context_lens)
    out = result_like(q, out, lse)
    batch = Batch(q, pool, layer, block_tables, context_lens, params)
    plan = plan_spans(batch, layout)
    parts = new_parts(q, plan)
    decode_spans(batch, layout, plan, parts, out, lse)
    merge_spans(parts, plan, batch, layout, out, lse)
    return out


def plan_spans(batch: Batch, layout: Layout, shared_tokens: int = 0, shared_spans: int = 0) -> SpanPlan:
    """How this batch is cut, from shapes and settings alone: no length is read by the host."""
    window = batch.params.window or 0
    keys = decode_tile(batch.q.device, layout.tile_key).keys
    max_tokens = batch.block_tables.shape[1] * layout.block_tokens - shared_tokens
    if window:
        max_tokens = min(max_tokens, window + keys - 1)  # from the start of the tile that the window begins in
    return SpanPlan(
        keys=keys,
        most=most_spans(layout.kv_heads),
        own=spans_within(layout.kv_heads, max_tokens),
        window=window,
        shared_tokens=shared_tokens,
        shared_spans=shared_spans,
    )


def decode_spans(batch: Batch, layout: Layout, plan: SpanPlan, parts: Parts, out: Tensor, lse: Tensor | None) -> None:
    """Write the partial result of every span into ``parts``, or into ``out`` and ``lse`` where a row has one only.

    The grid is fixed by the GPU, so a captured graph serves any lengths. Each program takes an equal share of all keys.
    """
    scalars = scalars_of(batch.params)
    tile = decode_tile(batch.q.device, layout.tile_key)
    sequences = batch.q.shape[0]
    programs = tile.programs * gpu_of(batch.q.device).multiprocessors
    launch(
        _paged_decode_kernel,
        (min(programs, sequences * layout.kv_heads * plan.own), 1, 1),
        batch.q,
        out,
        lse if lse is not None else out,
        parts.outputs,
        parts.lses,
        batch.q,
        batch.pool,
        batch.block_tables,
        batch.context_lens,
        batch.alibi_slopes,
        batch.kv_scales,
        batch.layer,
        sequences,
        batch.q.stride(0),
        out.stride(0),
        batch.block_tables.stride(0),
        batch.rows_per_block,
        plan.slots,
        plan.shared_tokens,
        plan.shared_spans,
        scalars.window,
        scalars.sinks,
        scalars.factor,
        scalars.cap,
        layout=replace(layout, causal=False),  # the one query is the last token
        rows=max(16, power_of_two(layout.group)),
        keys=tile.keys,
        most=plan.most,
        batch_block=max(64, power_of_two(sequences)),
        write_lse=lse is not None,
        num_warps=tile.warps,
        num_stages=tile.num_stages,
    )


@triton.jit
def _share_of_work(
    context_lens, sequences, shared_tokens, window, batch_block: tl.constexpr, keys: tl.constexpr, layout: tl.constexpr
):
    """This program's equal share ``[begin, stop)`` of all keys, laid end to end (sequence by sequence, head by head).

    Also the sequence that begin falls into, and where that sequence starts.
    """
    s = tl.arange(0, batch_block)
    ok = s < sequences
    lengths = tl.load(context_lens + s, mask=ok, other=0)
    tokens = visible_tokens(lengths, shared_tokens, window, keys, layout)
    work = tl.where(ok, tokens, 0).to(tl.int64) * layout.kv_heads
    total = tl.sum(work, 0)
    begin = total * tl.program_id(0) // tl.num_programs(0)
    stop = total * (tl.program_id(0) + 1) // tl.num_programs(0)
    before = ok & (tl.cumsum(work, 0) <= begin)
    return begin, stop, tl.sum(before.to(tl.int32), 0), tl.sum(tl.where(before, work, 0), 0)


@triton.jit
def _own_tokens(context_lens, sequence, sequences, shared_tokens, window, keys: tl.constexpr, layout: tl.constexpr):
    """Context length and keys to read of a sequence; of anything beyond the last, one."""
    length = tl.load(context_lens + sequence, mask=sequence < sequences, other=1)
    return length, visible_tokens(length, shared_tokens, window, keys, layout)


@triton.jit(
    do_not_specialize=[
        "layer", "sequences", "table_stride", "rows_per_block", "slots", "shared_tokens", "shared_spans", "window",
        "sinks",
    ]
)  # fmt: skip
def _paged_decode_kernel(
    out,  # [S, query_heads, head_dim]
    lse,  # [S, query_heads] f32, if write_lse
    parts,  # [S, slots, query_heads, head_dim] f32
    parts_lse,  # [S, slots, query_heads] f32
    q,  # [S, query_heads, head_dim]
    pool,  # [blocks, layers, 2, kv_heads, block_tokens, head_dim]
    block_tables,  # [S, table_stride] i32
    context_lens,  # [S] i32
    alibi_slopes,  # [query_heads] f32, if layout.alibi
    kv_scales,  # [2, kv_heads] f32, if layout.kv_scales
    layer,
    sequences,  # S
    q_stride,  # elements from row to row
    out_stride,
    table_stride,
    rows_per_block,
    slots,
    shared_tokens,
    shared_spans,
    window,
    sinks,
    factor,
    cap,
    layout: tl.constexpr,
    rows: tl.constexpr,  # the group, padded to what a matrix product takes
    keys: tl.constexpr,
    most: tl.constexpr,
    batch_block: tl.constexpr,
    write_lse: tl.constexpr,
):
    """One program: the spans that begin in its share of all keys, one after another."""
    at, stop, sequence, sequence_at = _share_of_work(
        context_lens, sequences, shared_tokens, window, batch_block, keys, layout
    )
    length, tokens = _own_tokens(context_lens, sequence, sequences, shared_tokens, window, keys, layout)
    span_length = span_tokens(tokens, most, keys)
    within = (at - sequence_at).to(tl.int32)
    kv_head = within // tokens
    span = tl.cdiv(within - kv_head * tokens, span_length)
    # Where the share begins inside a head's last span, span is one past the end: its step only moves to the next head.
    at = sequence_at + kv_head * tokens + tl.minimum(span * span_length, tokens)
    while at < stop:
        if span * span_length < tokens:
            _attend_span(
                out, lse, parts, parts_lse, q, pool, block_tables, alibi_slopes, kv_scales, layer, q_stride, out_stride,
                table_stride, rows_per_block, slots, shared_tokens, shared_spans, window, sinks, factor, cap,
                sequence, kv_head, length, tokens, span, span_length, layout, rows, keys, write_lse,
            )  # fmt: skip
        span += 1
        if span * span_length >= tokens:
            span = 0
            kv_head += 1
            if kv_head == layout.kv_heads:
                kv_head = 0
                sequence_at += tokens.to(tl.int64) * layout.kv_heads
                sequence += 1
                length, tokens = _own_tokens(context_lens, sequence, sequences, shared_tokens, window, keys, layout)
                span_length = span_tokens(tokens, most, keys)
        at = sequence_at + kv_head * tokens + span * span_length


@triton.jit
def _attend_span(
    out, lse, parts, parts_lse, q, pool, block_tables, alibi_slopes, kv_scales, layer, q_stride, out_stride,
    table_stride, rows_per_block, slots, shared_tokens, shared_spans, window, sinks, factor, cap,
    sequence, kv_head, length, tokens, span, span_length,
    layout: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr, write_lse: tl.constexpr,
):  # fmt: skip
    """One span of one sequence and kv head, all query heads of its group in one tile."""
    dim: tl.constexpr = layout.padded_dim
    r = tl.arange(0, rows)
    d = tl.arange(0, dim)
    ok = r < layout.group
    head = kv_head * layout.group + r
    wide_sequence = sequence.to(tl.int64)
    q_tile = tl.load(
        q + wide_sequence * q_stride + (head * layout.head_dim)[:, None] + d[None, :],
        mask=row_mask(ok, d, layout),
        other=0.0,
    ).to(layout.operand)
    positions = tl.full([rows], 0, tl.int32) + (length - 1)
    slopes = positions
    if layout.alibi:
        slopes = tl.load(alibi_slopes + head, mask=ok, other=0.0) * LOG2_E
    if layout.kv_scales:
        factor = factor * tl.load(kv_scales + kv_head)
    k_base, v_base = head_bases(pool, layer, kv_head, layout)
    table = block_tables + wide_sequence * table_stride

    m = tl.full([rows], FLOOR, tl.float32)
    den = tl.zeros([rows, keys], tl.float32)
    acc = tl.zeros([rows, dim], tl.float32)
    start_token = first_visible(length, shared_tokens, window, keys, layout)
    if layout.sinks:
        sinks_end = tl.minimum(sinks, start_token)
        if span != 0:
            sinks_end = shared_tokens
        for start in range(shared_tokens, sinks_end, keys):
            acc, m, den = attend_tile(
                acc, m, den, q_tile, k_base, v_base, table, start, sinks_end, positions, slopes,
                rows_per_block, window, sinks, factor, cap, layout, keys, True, True,
            )  # fmt: skip
    begin = start_token + span * span_length
    end = tl.minimum(begin + span_length, length)
    for start in range(begin, end, keys):
        acc, m, den = attend_tile(
            acc, m, den, q_tile, k_base, v_base, table, start, end, positions, slopes,
            rows_per_block, window, sinks, factor, cap, layout, keys, True, True,
        )  # fmt: skip
    acc, log2_sum = finish_rows(acc, m, tl.sum(den, 1))
    if layout.kv_scales:
        acc = acc * tl.load(kv_scales + layout.kv_heads + kv_head)

    inside = row_mask(ok, d, layout)
    if shared_spans == 0 and tokens <= span_length:
        row = wide_sequence * out_stride + head * layout.head_dim
        tl.store(out + row[:, None] + d[None, :], narrow(acc, out.dtype.element_ty, layout.interpreted), mask=inside)
        if write_lse:
            tl.store(lse + wide_sequence * layout.query_heads + head, log2_sum * LN2, mask=ok)
    else:
        row = (wide_sequence * slots + shared_spans + span) * layout.query_heads + head
        tl.store(parts + row[:, None] * layout.head_dim + d[None, :], acc, mask=inside)
        tl.store(parts_lse + row, log2_sum, mask=ok)
