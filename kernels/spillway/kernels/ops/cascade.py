"""Decode of sequences that begin alike: the shared keys are read once for the whole batch."""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelValueError
from spillway.kernels.ops.flash_prefill import attend_range
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.layout import Batch, Layout, check_tables, layout_of, result_like, scalars_of
from spillway.kernels.ops.paged_decode import decode_spans, plan_spans
from spillway.kernels.ops.spans import Parts, SpanPlan, merge_spans, new_parts
from spillway.kernels.ops.tiles import FLOOR, LOG2_E, finish_rows, head_bases, row_mask
from spillway.kernels.params import AttentionParams
from spillway.kernels.tuning.tables import prefill_tile

# A program of the prefix pass works on a multiple of this many tokens (whole tiles of any size), and a prefix is cut
# into at most so many spans.
_PREFIX_SPAN_TOKENS = 512
_MOST_PREFIX_SPANS = 16


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
    """See `spillway.kernels.cascade_decode`. Cascade inference: Ye et al. 2024 (FlashInfer), section 3.1."""
    layout = layout_of(q, pool, params)
    check_tables(block_tables, context_lens)
    out = result_like(q, out, lse)
    if shared_tokens < 0 or shared_tokens % layout.block_tokens:
        raise KernelValueError(f"shared_tokens must be whole blocks of {layout.block_tokens}, got {shared_tokens}")
    if shared_tokens > block_tables.shape[1] * layout.block_tokens:
        raise KernelValueError(f"{shared_tokens} shared tokens but tables of {block_tables.shape[1]} blocks")
    batch = Batch(q, pool, layer, block_tables, context_lens, params)
    span = _PREFIX_SPAN_TOKENS * max(1, -(-shared_tokens // (_PREFIX_SPAN_TOKENS * _MOST_PREFIX_SPANS)))
    plan = plan_spans(batch, layout, shared_tokens, shared_spans=-(-shared_tokens // span))
    parts = new_parts(q, plan)
    _attend_prefix(batch, layout, plan, parts, span)
    decode_spans(batch, layout, plan, parts, out, lse)
    merge_spans(parts, plan, batch, layout, out, lse)
    return out


def _attend_prefix(batch: Batch, layout: Layout, plan: SpanPlan, parts: Parts, span: int) -> None:
    """Write every row's partial results over the shared keys: all queries of the batch are rows of one product."""
    scalars = scalars_of(batch.params)
    rows = batch.q.shape[0] * layout.group
    tile = prefill_tile(batch.q.device, layout.tile_key, layout.group, rows_wanted=rows)
    tiles = -(-batch.q.shape[0] // (tile.rows // layout.group))
    launch(
        _attend_prefix_kernel,
        (tiles, layout.kv_heads, plan.shared_spans),
        batch.q,
        parts.outputs,
        parts.lses,
        batch.q,
        batch.pool,
        batch.block_tables,
        batch.context_lens,
        batch.alibi_slopes,
        batch.kv_scales,
        batch.layer,
        batch.q.shape[0],
        batch.q.stride(0),
        batch.rows_per_block,
        plan.slots,
        plan.shared_tokens,
        span,
        scalars.window,
        scalars.sinks,
        scalars.factor,
        scalars.cap,
        layout=replace(layout, causal=False),  # every query stands behind the whole prefix
        rows=tile.rows,
        keys=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.num_stages,
    )


@triton.jit(
    do_not_specialize=[
        "layer", "sequences", "rows_per_block", "slots", "shared_tokens", "span_tokens", "window", "sinks",
    ]
)  # fmt: skip
def _attend_prefix_kernel(
    parts,  # [S, slots, query_heads, head_dim] f32
    parts_lse,  # [S, slots, query_heads] f32
    q,  # [S, query_heads, head_dim]
    pool,  # [blocks, layers, 2, kv_heads, block_tokens, head_dim]
    block_table,  # [blocks] i32, of any sequence
    context_lens,  # [S] i32
    alibi_slopes,  # [query_heads] f32, if layout.alibi
    kv_scales,  # [2, kv_heads] f32, if layout.kv_scales
    layer,
    sequences,  # S
    q_stride,
    rows_per_block,
    slots,
    shared_tokens,
    span_tokens,
    window,
    sinks,
    factor,
    cap,
    layout: tl.constexpr,
    rows: tl.constexpr,
    keys: tl.constexpr,
):
    """One program: some sequences' queries of one kv head against one span of the prefix (axis 2)."""
    tokens_per_tile: tl.constexpr = rows // layout.group
    dim: tl.constexpr = layout.padded_dim
    kv_head = tl.program_id(1)
    span = tl.program_id(2)
    r = tl.arange(0, rows)
    d = tl.arange(0, dim)
    sequence = tl.program_id(0) * tokens_per_tile + r // layout.group
    head = kv_head * layout.group + r % layout.group
    ok = (sequence < sequences) & (r < tokens_per_tile * layout.group)
    wide_sequence = sequence.to(tl.int64)
    q_tile = tl.load(
        q + (wide_sequence * q_stride + head * layout.head_dim)[:, None] + d[None, :],
        mask=row_mask(ok, d, layout),
        other=0.0,
    ).to(layout.operand)
    positions = tl.load(context_lens + sequence, mask=ok, other=1) - 1
    slopes = positions
    if layout.alibi:
        slopes = tl.load(alibi_slopes + head, mask=ok, other=0.0) * LOG2_E
    if layout.kv_scales:
        factor = factor * tl.load(kv_scales + kv_head)
    k_base, v_base = head_bases(pool, layer, kv_head, layout)

    begin = span * span_tokens
    end = tl.minimum(begin + span_tokens, shared_tokens)
    m = tl.full([rows], FLOOR, tl.float32)
    den = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, dim], tl.float32)
    acc, m, den = attend_range(
        acc, m, den, q_tile, k_base, v_base, block_table, begin, end, tl.min(positions, 0), tl.max(positions, 0),
        positions, slopes, rows_per_block, window, sinks, factor, cap, layout, keys,
    )  # fmt: skip
    acc, log2_sum = finish_rows(acc, m, den)
    if layout.kv_scales:
        acc = acc * tl.load(kv_scales + layout.kv_heads + kv_head)
    row = (wide_sequence * slots + span) * layout.query_heads + head
    tl.store(parts + row[:, None] * layout.head_dim + d[None, :], acc, mask=row_mask(ok, d, layout))
    tl.store(parts_lse + row, log2_sum, mask=ok)
