"""How a long context is cut into spans that are worked on side by side, and how their results become one.

A cut depends on nothing but the sequence's own length, so a row's value is the same whatever shares its batch.
A partial result is a normalized output with its log-sum-exp (in log2 units); results of disjoint keys merge by weights
``exp2(lse - max lse)`` (FlashDecoding; Flash-Attention 2, Dao 2023, section 3.1).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.decode_split import MIN_SPAN_TOKENS
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.layout import Batch, Layout
from spillway.kernels.ops.tiles import FLOOR, LN2, narrow

_LEAST = tl.constexpr(MIN_SPAN_TOKENS)
_CHUNK = 16  # partial results folded at a time


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """How the rows of one decode batch are cut.

    Attributes:
        keys: tokens of a tile; spans are multiples of it.
        most: upper bound of the spans of any sequence: goes by the heads alone, for a kernel is compiled for it.
        own: upper bound of the spans of a sequence of this batch, shared ones apart; at most `most`.
        window: tokens, 0 where the layout has none.
        shared_tokens: leading keys that a prefix pass has taken over.
        shared_spans: partial results that it left for every row, in front of the row's own.
    """

    keys: int
    most: int
    own: int
    window: int
    shared_tokens: int = 0
    shared_spans: int = 0

    @property
    def slots(self) -> int:
        """Partial results that a row can have; one alone is written straight to the output."""
        total = self.shared_spans + self.own
        return 0 if total == 1 else total


@dataclass(frozen=True, slots=True)
class Parts:
    """Partial results: outputs ``[S, slots, query heads, head_dim]`` and lses ``[S, slots, query heads]``, float32."""

    outputs: Tensor
    lses: Tensor


def new_parts(q: Tensor, plan: SpanPlan) -> Parts:
    """Room for every partial result of a batch of queries ``[S, query heads, head_dim]``."""
    sequences, heads, dim = q.shape
    outputs = torch.empty(sequences, plan.slots, heads, dim, dtype=torch.float32, device=q.device)
    return Parts(outputs, torch.empty(outputs.shape[:3], dtype=torch.float32, device=q.device))


def merge_spans(parts: Parts, plan: SpanPlan, batch: Batch, layout: Layout, out: Tensor, lse: Tensor | None) -> None:
    """Fold each row's partial results into ``out`` and ``lse``; rows of one span wrote theirs already."""
    if plan.slots == 0:
        return
    launch(
        _merge_spans_kernel,
        (out.shape[0], layout.query_heads, 1),
        out,
        out,
        lse if lse is not None else out,
        parts.outputs,
        parts.lses,
        batch.context_lens,
        out.stride(0),
        plan.slots,
        plan.shared_tokens,
        plan.shared_spans,
        plan.window,
        layout=layout,
        keys=plan.keys,
        most=plan.most,
        chunk=_CHUNK,
        write_lse=lse is not None,
        num_warps=4,
    )


@triton.jit
def span_tokens(tokens, most: tl.constexpr, keys: tl.constexpr):
    """Tokens of each span (the last may be shorter) of a context of ``tokens``: a multiple of the tile."""
    even = tl.cdiv(tl.cdiv(tokens, most), keys) * keys
    return tl.maximum(even, _LEAST)


@triton.jit
def first_visible(length, shared_tokens, window, keys: tl.constexpr, layout: tl.constexpr):
    """First own key that the query at position length - 1 reads, sinks apart; rounded down to whole tiles."""
    start = shared_tokens
    if layout.window:
        start = tl.maximum(start, tl.maximum(length - window, 0) // keys * keys)
    return start


@triton.jit
def visible_tokens(length, shared_tokens, window, keys: tl.constexpr, layout: tl.constexpr):
    """How many own keys a query reads; 1 for none, so that every row has a span that writes its result."""
    return tl.maximum(length - first_visible(length, shared_tokens, window, keys, layout), 1)


@triton.jit(do_not_specialize=["slots", "shared_tokens", "shared_spans", "window"])
def _merge_spans_kernel(
    out,  # [S, query_heads, head_dim]
    lse,  # [S, query_heads] f32, if write_lse
    parts,  # [S, slots, query_heads, head_dim] f32
    parts_lse,  # [S, slots, query_heads] f32
    context_lens,  # [S] i32
    out_stride,
    slots,
    shared_tokens,
    shared_spans,
    window,
    layout: tl.constexpr,
    keys: tl.constexpr,
    most: tl.constexpr,
    chunk: tl.constexpr,
    write_lse: tl.constexpr,
):
    """One program: one row (sequence, query head)."""
    dim: tl.constexpr = layout.padded_dim
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    tokens = visible_tokens(tl.load(context_lens + sequence), shared_tokens, window, keys, layout)
    spans = shared_spans + tl.cdiv(tokens, span_tokens(tokens, most, keys))
    if spans == 1:
        return

    d = tl.arange(0, dim)
    inside = d < layout.head_dim
    m = tl.full([1], FLOOR, tl.float32)
    den = tl.zeros([1], tl.float32)
    acc = tl.zeros([dim], tl.float32)
    for start in range(0, spans, chunk):
        span = start + tl.arange(0, chunk)
        ok = span < spans
        row = (sequence * slots + span) * layout.query_heads + head
        part_lse = tl.load(parts_lse + row, mask=ok, other=float("-inf"))
        m_new = tl.maximum(m, tl.max(part_lse, 0))
        weight = tl.exp2(part_lse - m_new)
        alpha = tl.exp2(m - m_new)
        part = tl.load(
            parts + row[:, None] * layout.head_dim + d[None, :], mask=ok[:, None] & inside[None, :], other=0.0
        )
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        den = den * alpha + tl.sum(weight, 0)
        m = m_new
    seen = den > 0.0
    den = tl.where(seen, den, 1.0)
    tl.store(
        out + sequence * out_stride + head * layout.head_dim + d,
        narrow(acc / den, out.dtype.element_ty, layout.interpreted),
        mask=inside,
    )
    if write_lse:
        log_sum = tl.where(seen, (m + tl.log2(den)) * LN2, float("-inf"))
        tl.store(lse + sequence * layout.query_heads + head + tl.arange(0, 1), log_sum)
