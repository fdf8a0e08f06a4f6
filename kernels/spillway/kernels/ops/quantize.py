"""Whole KV blocks as bytes and back, in the layout of `spillway.kernels.quantization`."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.tiles import narrow
from spillway.kernels.quantization import QuantFormat, group_channels, groups_per_layer, quantized_block_bytes
from spillway.kernels.tuning.gpu import INTERPRETED, gpu_of, power_of_two

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CodeLayout:
    """One compiled variant: where the codes, scales and minima of a block are.

    Attributes:
        kv_heads, block_tokens, head_dim: shape of a layer's side of a block.
        padded_dim: head_dim up to a power of two.
        run: channels of a value group.
        key_groups, value_groups: of one layer.
        fp8: e4m3 codes; else integers from 0 to levels.
        levels: largest integer code.
        row_bytes: bytes of one quantized block.
        code_bytes: where the scales begin.
        scale_halves: float16 numbers from the first scale to the first minimum.
        interpreted: round for the interpreter.
    """

    kv_heads: int
    block_tokens: int
    head_dim: int
    padded_dim: int
    run: int
    key_groups: int
    value_groups: int
    fp8: bool
    levels: int
    row_bytes: int
    code_bytes: int
    scale_halves: int
    interpreted: bool


def quantize(blocks: Tensor, quant_format: QuantFormat, *, out: Tensor | None = None) -> Tensor:
    """See `spillway.kernels.quantize`."""
    layout = _layout(blocks, quant_format)
    shape = (blocks.shape[0], layout.row_bytes)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=blocks.device)
    _check_packed(out, shape)
    layers = blocks.shape[1]
    launch(
        _quantize_kernel,
        (blocks.shape[0], layers * layout.kv_heads, 2),
        blocks,
        out,
        out.view(torch.float16),
        blocks,
        layers,
        layout=layout,
        num_warps=8,
    )
    return out


def dequantize(packed: Tensor, quant_format: QuantFormat, out: Tensor) -> Tensor:
    """See `spillway.kernels.dequantize`."""
    layout = _layout(out, quant_format)
    _check_packed(packed, (out.shape[0], layout.row_bytes))
    layers = out.shape[1]
    launch(
        _dequantize_kernel,
        (out.shape[0], layers * layout.kv_heads, 2),
        out,
        out,
        packed,
        packed.view(torch.float16),
        layers,
        layout=layout,
        num_warps=8,
    )
    return out


def _check_packed(packed: Tensor, shape: tuple[int, int]) -> None:
    if packed.shape != shape or not packed.is_contiguous():
        raise KernelShapeError(f"packed blocks must be contiguous {shape}, got {tuple(packed.shape)}")
    if packed.dtype is not torch.uint8:
        raise KernelDtypeError(f"packed blocks are uint8, got {packed.dtype}")


def _layout(blocks: Tensor, quant_format: QuantFormat) -> CodeLayout:
    if blocks.dim() != 6 or not blocks.is_contiguous():
        raise KernelShapeError(
            f"blocks must be contiguous [n, layers, 2, kv_heads, block_tokens, head_dim], got {tuple(blocks.shape)}"
        )
    if blocks.dtype not in _FLOATS:
        raise KernelDtypeError(f"blocks are float32, bfloat16 or float16, got {blocks.dtype}")
    if quant_format is QuantFormat.FP8 and gpu_of(blocks.device).capability < (8, 9):
        raise KernelDtypeError("fp8 codes need compute capability 8.9 or later; use int8 here")
    row_bytes = quantized_block_bytes(blocks.shape[1:], quant_format)
    layers, _, kv_heads, block_tokens, head_dim = blocks.shape[1:]
    key_groups, value_groups = groups_per_layer(kv_heads, block_tokens, head_dim)
    return CodeLayout(
        kv_heads=kv_heads,
        block_tokens=block_tokens,
        head_dim=head_dim,
        padded_dim=power_of_two(head_dim),
        run=group_channels(head_dim),
        key_groups=key_groups,
        value_groups=value_groups,
        fp8=quant_format is QuantFormat.FP8,
        levels=2**quant_format.code_bits - 1,
        row_bytes=row_bytes,
        code_bytes=blocks[:1].numel() * quant_format.code_bits // 8,
        scale_halves=layers * (key_groups + value_groups),
        interpreted=INTERPRETED,
    )


@triton.jit
def _scale_of(high, low, layout: tl.constexpr):
    """Scale (as float16 holds it) of groups from low, or of size high in fp8: rounded up, lest a value be clipped."""
    if layout.fp8:
        scale = high / 448.0 * 1.0009765625 + 5.960464477539063e-08
    else:
        scale = (high - low) / layout.levels * 1.0009765625 + 5.960464477539063e-08
    return tl.minimum(scale, 65504.0).to(tl.float16)


@triton.jit
def _low_of(smallest):
    """A group's minimum as float16 holds it, rounded down."""
    low = smallest - (tl.abs(smallest) * 0.0009765625 + 5.960464477539063e-08)
    return tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def _group_bounds(x, ok, axis: tl.constexpr, layout: tl.constexpr):
    """(high, low) of the values where ok, along axis; in fp8 high is the largest magnitude and low unused."""
    if layout.fp8:
        high = tl.max(tl.where(ok, tl.abs(x), 0.0), axis)
        low = high
    else:
        high = tl.max(tl.where(ok, x, float("-inf")), axis)
        low = tl.min(tl.where(ok, x, float("inf")), axis)
    return high, low


@triton.jit
def _place(layout: tl.constexpr):
    """Of this program: (layer, head, first element of its tile within the block, first group of the layer's)."""
    layer = tl.program_id(1) // layout.kv_heads
    head = tl.program_id(1) % layout.kv_heads
    side = tl.program_id(2)
    tile = ((layer * 2 + side) * layout.kv_heads + head) * (layout.block_tokens * layout.head_dim)
    group = layer * (layout.key_groups + layout.value_groups)
    return head, tile, group


@triton.jit
def _key_scales(scales, x, ok, d, layout: tl.constexpr):
    """Store scales and minima of a head's channels; both as float32 tiles like x."""
    inside = d < layout.head_dim
    high, smallest = _group_bounds(x, ok, 0, layout)
    low = _low_of(smallest)
    scale = _scale_of(high, low.to(tl.float32), layout)
    tl.store(scales + d, scale, mask=inside)
    if not layout.fp8:
        tl.store(scales + layout.scale_halves + d, low, mask=inside)
    like = tl.zeros_like(x)
    return like + low.to(tl.float32)[None, :], like + scale.to(tl.float32)[None, :]


@triton.jit
def _value_scales(scales, x, ok, t, d, layout: tl.constexpr):
    """Store scales and minima of a head's tokens and runs of channels; both as float32 tiles like x."""
    runs: tl.constexpr = layout.head_dim // layout.run
    lows = tl.zeros_like(x)
    tile_scales = tl.zeros_like(x)
    for run in tl.static_range(runs):
        mine = ok & (d // layout.run == run)[None, :]
        high, smallest = _group_bounds(x, mine, 1, layout)
        low = _low_of(smallest)
        scale = _scale_of(high, low.to(tl.float32), layout)
        tl.store(scales + t * runs + run, scale)
        if not layout.fp8:
            tl.store(scales + layout.scale_halves + t * runs + run, low)
        lows = tl.where(mine, low.to(tl.float32)[:, None], lows)
        tile_scales = tl.where(mine, scale.to(tl.float32)[:, None], tile_scales)
    return lows, tile_scales


@triton.jit(do_not_specialize=["layers"])
def _quantize_kernel(
    packed,  # [n, row_bytes] u8
    halves,  # the same memory as f16
    blocks,  # [n, layers, 2, kv_heads, block_tokens, head_dim]
    layers,
    layout: tl.constexpr,
):
    """One program: keys (axis 2 at 0) or values (1) of one head of one layer of one block."""
    n = tl.program_id(0).to(tl.int64)
    head, tile, group = _place(layout)
    t = tl.arange(0, layout.block_tokens)
    d = tl.arange(0, layout.padded_dim)
    ok = (t >= 0)[:, None] & (d < layout.head_dim)[None, :]
    block_elements = layers * (2 * layout.kv_heads * layout.block_tokens * layout.head_dim)
    at = t[:, None] * layout.head_dim + d[None, :]
    x = tl.load(blocks + n * block_elements + tile + at, mask=ok, other=0.0).to(tl.float32)
    scales = halves + n * (layout.row_bytes // 2) + layout.code_bytes // 2 + group
    if tl.program_id(2) == 0:
        low, scale = _key_scales(scales + head * layout.head_dim, x, ok, d, layout)
    else:
        value_scales = scales + layout.key_groups + head * layout.block_tokens * (layout.head_dim // layout.run)
        low, scale = _value_scales(value_scales, x, ok, t, d, layout)
    scale = tl.where(ok, scale, 1.0)
    _store_codes(packed + n * layout.row_bytes, tile, t, d, x, low, scale, layout)


@triton.jit
def _store_codes(row, tile, t, d, x, low, scale, layout: tl.constexpr):
    """Codes of a tile of values; int4 packs neighbours along head_dim, the even one low."""
    at = t[:, None] * layout.head_dim + d[None, :]
    ok = (t >= 0)[:, None] & (d < layout.head_dim)[None, :]
    if layout.fp8:
        y = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
        code = narrow(y, tl.float8e4nv, layout.interpreted).to(tl.uint8, bitcast=True)
        tl.store(row + tile + at, code, mask=ok)
    else:
        y = tl.floor((x - low) / scale + 0.5)
        code = tl.minimum(tl.maximum(y, 0.0), layout.levels * 1.0).to(tl.int32)
        if layout.levels > 15:
            tl.store(row + tile + at, code.to(tl.uint8), mask=ok)
        else:
            even, odd = tl.split(tl.reshape(code, [layout.block_tokens, layout.padded_dim // 2, 2]))
            pair = tl.arange(0, layout.padded_dim // 2)
            packed_at = t[:, None] * (layout.head_dim // 2) + pair[None, :]
            paired = (t >= 0)[:, None] & (pair < layout.head_dim // 2)[None, :]
            tl.store(row + tile // 2 + packed_at, (even | (odd << 4)).to(tl.uint8), mask=paired)


@triton.jit
def _load_codes(row, tile, t, d, ok, layout: tl.constexpr):
    """Codes of a tile as float32."""
    at = t[:, None] * layout.head_dim + d[None, :]
    if layout.fp8:
        raw = tl.load(row + tile + at, mask=ok, other=0)
        code = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif layout.levels > 15:
        code = tl.load(row + tile + at, mask=ok, other=0).to(tl.float32)
    else:
        raw = tl.load(row + tile // 2 + at // 2, mask=ok, other=0).to(tl.int32)
        code = ((raw >> ((d % 2) * 4)[None, :]) & 15).to(tl.float32)
    return code


@triton.jit(do_not_specialize=["layers"])
def _dequantize_kernel(
    blocks,  # [n, layers, 2, kv_heads, block_tokens, head_dim]
    packed,  # [n, row_bytes] u8
    halves,  # the same memory as f16
    layers,
    layout: tl.constexpr,
):
    """One program: keys (axis 2 at 0) or values (1) of one head of one layer of one block."""
    n = tl.program_id(0).to(tl.int64)
    head, tile, group = _place(layout)
    t = tl.arange(0, layout.block_tokens)
    d = tl.arange(0, layout.padded_dim)
    ok = (t >= 0)[:, None] & (d < layout.head_dim)[None, :]
    if tl.program_id(2) == 0:
        number = (t * 0)[:, None] + (head * layout.head_dim + d)[None, :]
    else:
        runs: tl.constexpr = layout.head_dim // layout.run
        number = layout.key_groups + (head * layout.block_tokens + t)[:, None] * runs + (d // layout.run)[None, :]
    code = _load_codes(packed + n * layout.row_bytes, tile, t, d, ok, layout)
    scales = halves + n * (layout.row_bytes // 2) + layout.code_bytes // 2 + group
    x = code * tl.load(scales + number, mask=ok, other=0.0).to(tl.float32)
    if not layout.fp8:
        x += tl.load(scales + layout.scale_halves + number, mask=ok, other=0.0).to(tl.float32)
    block_elements = layers * (2 * layout.kv_heads * layout.block_tokens * layout.head_dim)
    at = t[:, None] * layout.head_dim + d[None, :]
    tl.store(
        blocks + n * block_elements + tile + at,
        narrow(x, blocks.dtype.element_ty, layout.interpreted),
        mask=ok,
    )
