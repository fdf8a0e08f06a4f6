"""Tokens from logits on the device: temperature, top-k, top-p and min-p without sorting."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.tiles import LOG2_E

_BLOCK = 512
_EVERY = tl.constexpr(-2147483647)  # an edge below every number


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How each row of logits is drawn from; all tensors ``[R]`` and contiguous on the logits' device.

    Attributes:
        temperature: float32; 0 takes the most likely token, the first of several.
        top_k: int32; only the k most likely tokens, 0 means all. Of equal tokens at the edge the first are kept.
        top_p: float32; only the fewest most likely of those whose share of the mass reaches p, 1 means all.
        min_p: float32; only tokens at least this likely, relative to the most likely; 0 means all.
        uniform: float32 in [0, 1): where in the cumulative distribution, most likely token first, to draw.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


def sample(logits: Tensor, settings: SampleSettings, *, out: Tensor | None = None) -> Tensor:
    """Draw one token per row by inverse transform; a row's token depends on its own logits and settings only.

    The edge of top-k, the edge of top-p and the token itself are each "the largest value t such that the tokens >= t
    count, or weigh, at least so much". The bits of t are found four at a time, each time by one pass over the row for
    fifteen candidates at once: no sort, no scratch memory (compare Sorting-free sampling, FlashInfer).

    Args:
        logits: ``[R, vocabulary]`` float32, rows contiguous.
        settings: per row.
        out: ``[R]`` int64 to write into.

    Returns:
        ``out``: token ids; -1 for a row that holds NaN or has no finite largest logit.

    Raises:
        KernelShapeError, KernelDtypeError: tensors that do not fit together.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise KernelShapeError(f"logits must be rows of [R, vocabulary], got {tuple(logits.shape)} {logits.stride()}")
    rows = logits.shape[0]
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    floats = (settings.temperature, settings.top_p, settings.min_p, settings.uniform)
    for tensor in (*floats, settings.top_k, out):
        if tensor.shape != (rows,) or not tensor.is_contiguous():
            raise KernelShapeError(f"settings and out must be contiguous [{rows}], got {tuple(tensor.shape)}")
    if any(tensor.dtype is not torch.float32 for tensor in (logits, *floats)):
        raise KernelDtypeError("logits, temperature, top_p, min_p and uniform are float32")
    if settings.top_k.dtype is not torch.int32 or out.dtype is not torch.int64:
        raise KernelDtypeError(f"top_k is int32 and out int64, got {settings.top_k.dtype} and {out.dtype}")
    launch(
        _sample_kernel,
        (rows, 1, 1),
        logits,
        out,
        logits,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        settings.uniform,
        logits.stride(0),
        logits.shape[1],
        block=_BLOCK,
        num_warps=16,
    )
    return out


@triton.jit
def _order_of(x):
    """Floats as integers in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(order):
    """Opposite of _order_of."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _amounts(row, vocabulary, thresholds, peak, rate, weighted: tl.constexpr, block: tl.constexpr):
    """How much of the row is at or above each of sixteen thresholds: total weight, or number of tokens.

    Always summed in the same order, so more tokens never give a smaller sum and equal sets give equal sums.
    """
    total = tl.zeros([block, 16], tl.float32)
    for start in tl.range(0, vocabulary, block, num_stages=4):
        i = start + tl.arange(0, block)
        x = tl.load(row + i, mask=i < vocabulary, other=float("-inf"))
        amount = tl.where(i < vocabulary, 1.0, 0.0)
        if weighted:
            amount = tl.exp2((x - peak) * rate)
        total += tl.where(_order_of(x)[:, None] >= thresholds[None, :], amount[:, None], 0.0)
    return tl.sum(total, 0)


@triton.jit
def _edge(row, vocabulary, target, peak, rate, weighted: tl.constexpr, strict: tl.constexpr, block: tl.constexpr):
    """The largest value, in the order of _order_of, such that the tokens at or above it amount to target.

    strict: to more than target.
    """
    candidates = tl.arange(0, 16)
    edge = tl.full([1], -2147483648, tl.int32)
    for digit in range(8):
        step = tl.full([1], 1, tl.int32) << (28 - 4 * digit)
        amounts = _amounts(row, vocabulary, edge + candidates * step, peak, rate, weighted, block)
        enough = amounts > target if strict else amounts >= target
        edge += (tl.sum((enough | (candidates == 0)).to(tl.int32), 0) - 1) * step
    return tl.sum(edge, 0)


@triton.jit
def _above(row, vocabulary, edge, peak, rate, weighted: tl.constexpr, block: tl.constexpr):
    """Amount strictly above an edge, and at or above it."""
    sides = tl.arange(0, 16)
    # No token but NaN has the largest integer, and rows with NaN have been turned away: edge + 1 cannot wrap.
    amounts = _amounts(row, vocabulary, edge + tl.where(sides == 0, 1, 0), peak, rate, weighted, block)
    return tl.sum(tl.where(sides == 0, amounts, 0.0), 0), tl.sum(tl.where(sides == 1, amounts, 0.0), 0)


@triton.jit
def _token_at(row, vocabulary, edge, rank, block: tl.constexpr):
    """Index of the rank-th (from 0) token whose value is exactly the edge."""
    before = 0
    token = tl.full([1], 0, tl.int32)
    for start in tl.range(0, vocabulary, block, num_stages=4):
        i = start + tl.arange(0, block)
        x = tl.load(row + i, mask=i < vocabulary, other=float("nan"))
        equal = ((_order_of(x) == edge) & (i < vocabulary)).to(tl.int32)
        number = before + tl.cumsum(equal, 0)
        token += tl.sum(tl.where((equal == 1) & (number == rank + 1), i, 0), 0)
        before += tl.sum(equal, 0)
    return tl.sum(token, 0)


@triton.jit
def _narrow_to(edge, kept, new_edge, new_kept):
    """The smaller of two sets of most likely tokens, each given by its lowest value and how many hold that value."""
    kept = tl.where(new_edge > edge, new_kept, tl.where(new_edge == edge, tl.minimum(kept, new_kept), kept))
    return tl.maximum(edge, new_edge), kept


@triton.jit
def _mass(row, vocabulary, edge, kept, peak, rate, block: tl.constexpr):
    """Weight of the tokens above an edge and of as many as are kept of those that hold it."""
    above, at_or_above = _above(row, vocabulary, edge, peak, rate, True, block)
    weight = tl.exp2((_value_of(edge) - peak) * rate)
    return tl.where(edge == _EVERY, at_or_above, tl.minimum(above + weight * kept, at_or_above))


@triton.jit(do_not_specialize=["row_stride", "vocabulary"])
def _sample_kernel(
    out,  # [R] i64
    logits,  # [R, vocabulary] f32
    temperatures,  # [R] f32
    top_ks,  # [R] i32
    top_ps,  # [R] f32
    min_ps,  # [R] f32
    uniforms,  # [R] f32
    row_stride,
    vocabulary,
    block: tl.constexpr,
):
    """One program: one row.

    The tokens that may be drawn are always the most likely ones, so they are known by their lowest value (the edge)
    and by how many of the tokens that hold it are kept, which are the first ones.
    """
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * row_stride
    peaks = tl.full([block], float("-inf"), tl.float32)
    wrong = tl.zeros([block], tl.int32)
    for start in tl.range(0, vocabulary, block, num_stages=4):
        i = start + tl.arange(0, block)
        x = tl.load(row + i, mask=i < vocabulary, other=float("-inf"))
        wrong = wrong | (x != x).to(tl.int32)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, 0)
    if (tl.max(wrong, 0) > 0) | (tl.abs(peak) == float("inf")):
        tl.store(out + r, -1)
        return
    temperature = tl.load(temperatures + r)
    if temperature <= 0.0:
        tl.store(out + r, _token_at(row, vocabulary, _order_of(peak), 0, block).to(tl.int64))
        return

    rate = LOG2_E / temperature
    edge = _EVERY
    kept = vocabulary
    top_k = tl.load(top_ks + r)
    if (top_k > 0) & (top_k < vocabulary):
        edge = _edge(row, vocabulary, top_k.to(tl.float32), peak, rate, False, False, block)
        above, _ = _above(row, vocabulary, edge, peak, rate, False, block)
        kept = top_k - above.to(tl.int32)
    top_p = tl.load(top_ps + r)
    if top_p < 1.0:
        total = _mass(row, vocabulary, edge, kept, peak, rate, block)
        wanted_mass = tl.maximum(top_p * total, 1.0e-30)  # the most likely token is always kept
        nucleus = _edge(row, vocabulary, wanted_mass, peak, rate, True, False, block)
        above, _ = _above(row, vocabulary, nucleus, peak, rate, True, block)
        weight = tl.exp2((_value_of(nucleus) - peak) * rate)
        wanted = tl.maximum(tl.ceil((wanted_mass - above) / weight), 1.0)
        edge, kept = _narrow_to(edge, kept, nucleus, tl.minimum(wanted, 2147483520.0).to(tl.int32))
    min_p = tl.load(min_ps + r)
    if min_p > 0.0:
        edge, kept = _narrow_to(edge, kept, _order_of(peak + tl.log2(tl.minimum(min_p, 1.0)) / rate), vocabulary)

    total = _mass(row, vocabulary, edge, kept, peak, rate, block)
    target = tl.minimum(tl.load(uniforms + r), 0.999999) * total
    drawn = _edge(row, vocabulary, target, peak, rate, True, True, block)
    above, _ = _above(row, vocabulary, drawn, peak, rate, True, block)
    weight = tl.exp2((_value_of(drawn) - peak) * rate)
    rank = tl.maximum(tl.floor((target - above) / weight), 0.0).to(tl.int32)
    higher, held = _above(row, vocabulary, drawn, peak, rate, False, block)
    last = (held - higher).to(tl.int32) - 1
    if drawn == edge:
        last = tl.minimum(last, kept - 1)
    tl.store(out + r, _token_at(row, vocabulary, drawn, tl.minimum(rank, last), block).to(tl.int64))
