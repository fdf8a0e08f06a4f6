"""KV blocks as codes and back; the formulas and the layout are those of `spillway.kernels.quantization`."""

from typing import Any

from llvmlite import ir

from spillway.kernels.cpu.block_layout import (
    BLOCK_TOKENS,
    CHANNELS,
    CODE,
    CODE_BITS,
    COUNT,
    FP8_CODE,
    INT4_CODE,
    INT8_CODE,
    KV_HEADS,
    LAYERS,
    MINIMA,
    PACKED,
    PACKED_STRIDE,
    RUN,
    SCALES,
    VALUES,
    VALUES_FORMAT,
)
from spillway.kernels.cpu.jit.emit import F16, F32, I8, I32, I64, LANES, Emitter, lanes_of, microkernel, vector
from spillway.kernels.cpu.jit.formats import float_to_fp8, fp8_to_float
from spillway.kernels.cpu.jit.microkernels import load_row, store_row
from spillway.kernels.cpu.jit.scalars import fetch_add, store_int
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import arg, item_bytes
from spillway.kernels.cpu.launch import SCRATCH, SCRATCH_BYTES, TICKET, WORKER

LEVELS = {INT8_CODE: 255.0, INT4_CODE: 15.0}
PAIR = 2  # channels handled at once behind the last whole vector: int4 packs two to a byte


def _loops(e: Emitter, count: Any) -> list[tuple[int, Any, Any]]:
    """Loops over an even count: by whole vectors, then in pairs."""
    full = e.b.and_(count, e.i64(-LANES))
    return [(LANES, e.i64(0), full), (PAIR, full, count)]


def _to_half(e: Emitter, value: Any) -> tuple[Any, Any]:
    """A number of the header: in float16, saturated, and what that is in float32."""
    value = e.smaller(e.const(value, 65504.0), e.larger(e.const(value, -65504.0), value))
    half = e.b.fptrunc(value, vector(F16, lanes_of(value)))
    return half, e.b.fpext(half, value.type)


def _widened_up(e: Emitter, value: Any) -> Any:
    """value * (1 + 2^-10) + 2^-24: still not below the value once rounded to float16."""
    return e.b.fadd(e.b.fmul(value, e.const(value, 1 + 2.0**-10)), e.const(value, 2.0**-24))


def _header(e: Emitter, low: Any, high: Any, code: int) -> tuple[Any, Any, Any, Any]:
    """Scale and minimum of groups: (float16 scale, scale, float16 minimum, minimum); low and high are extremes."""
    if code == FP8_CODE:
        size = e.larger(e.absolute(low), e.absolute(high))
        scale = _widened_up(e, e.b.fdiv(size, e.const(size, 448.0)))
        return *_to_half(e, scale), None, None
    slack = e.b.fadd(e.b.fmul(e.absolute(low), e.const(low, 2.0**-10)), e.const(low, 2.0**-24))
    low_half, low = _to_half(e, e.b.fsub(low, slack))
    scale = _widened_up(e, e.b.fdiv(e.b.fsub(high, low), e.const(low, LEVELS[code])))
    return *_to_half(e, scale), low_half, low


def _encode(e: Emitter, x: Any, scale: Any, low: Any, code: int) -> Any:
    """Codes in int32 lanes."""
    if code == FP8_CODE:
        return float_to_fp8(e, e.b.fdiv(x, scale))
    steps = e.floor(e.b.fadd(e.b.fdiv(e.b.fsub(x, low), scale), e.const(x, 0.5)))
    steps = e.larger(e.const(x, 0.0), e.smaller(e.const(x, LEVELS[code]), steps))
    return e.b.fptosi(steps, vector(I32, lanes_of(x)))


def _every_second(e: Emitter, value: Any, start: int) -> Any:
    """Lanes start, start + 2, ...; of a pair, that one lane."""
    lanes = lanes_of(value)
    if lanes == PAIR:
        return e.b.extract_element(value, ir.Constant(I32, start))
    return e.shuffle(value, value, list(range(start, lanes, 2)))


def _store_codes(e: Emitter, codes: Any, row: Any, channel: Any, code: int) -> None:
    """Put codes where their channels are in a row of codes."""
    if code == INT4_CODE:
        even, odd = _every_second(e, codes, 0), _every_second(e, codes, 1)
        codes, channel = e.b.or_(even, e.b.shl(odd, e.const(odd, 4))), e.b.ashr(channel, e.i64(1))
    e.store(e.b.trunc(codes, vector(I8, lanes_of(codes))), e.b.add(row, channel))


def _load_codes(e: Emitter, row: Any, channel: Any, lanes: int, code: int) -> Any:
    """Codes of consecutive channels as int32 lanes."""
    whole = vector(I32, lanes)
    if code != INT4_CODE:
        return e.b.zext(e.load(e.b.add(row, channel), I8, lanes), whole)
    pairs = e.load(e.b.add(row, e.b.ashr(channel, e.i64(1))), I8, lanes // 2)
    twice = e.splat(pairs, PAIR) if lanes == PAIR else e.shuffle(pairs, pairs, [n // 2 for n in range(lanes)])
    shifts = ir.Constant(whole, [ir.Constant(I32, 4 * (n % 2)) for n in range(lanes)])
    codes = e.b.lshr(e.b.zext(twice, whole), shifts)
    return e.b.and_(codes, e.const(codes, 15))


def _decode(e: Emitter, codes: Any, scale: Any, low: Any, code: int) -> Any:
    if code == FP8_CODE:
        return e.b.fmul(fp8_to_float(e, codes), scale)
    return e.b.fadd(low, e.b.fmul(e.b.uitofp(codes, scale.type), scale))


@microkernel("viiiiiiii")
def encode_keys(e, code, source, stride, tokens, channels, codes, code_stride, scales_and_minima):
    """Keys of one head, float32 ``[tokens]`` rows ``stride`` bytes apart, grouped per channel over the tokens.

    ``scales_and_minima`` is the address of two int64: where the groups' float16 numbers go.
    """

    def case(kind):
        def write():
            scales, minima = _two(e, scales_and_minima)
            for lanes, start, stop in _loops(e, channels):
                with e.loop(start, stop, lanes) as channel:
                    column = e.at(source, channel, 4)
                    first = e.load(column, F32, lanes)
                    low, high = e.variable(first), e.variable(first)
                    with e.loop(e.i64(1), tokens) as token:
                        x = e.load(e.b.add(column, e.b.mul(stride, token)), F32, lanes)
                        e.b.store(e.smaller(x, e.b.load(low)), low)
                        e.b.store(e.larger(x, e.b.load(high)), high)
                    scale_half, scale, low_half, minimum = _header(e, e.b.load(low), e.b.load(high), kind)
                    e.store(scale_half, e.at(scales, channel, 2))
                    if low_half is not None:
                        e.store(low_half, e.at(minima, channel, 2))
                    with e.loop(e.i64(0), tokens) as token:
                        x = e.load(e.b.add(column, e.b.mul(stride, token)), F32, lanes)
                        row = e.b.add(codes, e.b.mul(code_stride, token))
                        _store_codes(e, _encode(e, x, scale, minimum, kind), row, channel, kind)

        return write

    e.switch(code, [case(kind) for kind in range(3)])


@microkernel("viiiiiii")
def decode_keys(e, code, codes, code_stride, tokens, channels, scales_and_minima, target):
    """Undo encode_keys, into float32 rows of ``channels`` padded to 16."""

    def case(kind):
        def write():
            scales, minima = _two(e, scales_and_minima)
            stride = e.b.mul(e.b.and_(e.b.add(channels, e.i64(15)), e.i64(-16)), e.i64(4))
            for lanes, start, stop in _loops(e, channels):
                with e.loop(start, stop, lanes) as channel:
                    scale, minimum = (
                        e.b.fpext(e.load(e.at(place, channel, 2), F16, lanes), vector(F32, lanes))
                        for place in (scales, minima)
                    )
                    with e.loop(e.i64(0), tokens) as token:
                        row = e.b.add(codes, e.b.mul(code_stride, token))
                        value = _decode(e, _load_codes(e, row, channel, lanes, kind), scale, minimum, kind)
                        e.store(value, e.b.add(e.at(target, channel, 4), e.b.mul(stride, token)))

        return write

    e.switch(code, [case(kind) for kind in range(3)])


@microkernel("viiiiii")
def encode_run(e, code, source, run, codes, first_channel, scale_and_minimum):
    """One token's values of one group, float32; ``codes`` is the token's row of codes.

    ``scale_and_minimum`` is the address of two int64: where the group's float16 numbers go.
    """

    def case(kind):
        def write():
            scale_place, minimum_place = _two(e, scale_and_minimum)
            extremes = []
            for choose, fold in ((e.smaller, e.min_lanes), (e.larger, e.max_lanes)):
                found = e.variable(e.load(source, F32, 1))
                for lanes, start, stop in _loops(e, run):
                    with e.loop(start, stop, lanes) as i:
                        e.b.store(choose(fold(e.load(e.at(source, i, 4), F32, lanes)), e.b.load(found)), found)
                extremes.append(e.b.load(found))
            scale_half, scale, low_half, minimum = _header(e, extremes[0], extremes[1], kind)
            e.store(scale_half, scale_place)
            if low_half is not None:
                e.store(low_half, minimum_place)
            for lanes, start, stop in _loops(e, run):
                with e.loop(start, stop, lanes) as i:
                    low = None if minimum is None else e.splat(minimum, lanes)
                    x = _encode(e, e.load(e.at(source, i, 4), F32, lanes), e.splat(scale, lanes), low, kind)
                    _store_codes(e, x, codes, e.b.add(first_channel, i), kind)

        return write

    e.switch(code, [case(kind) for kind in range(3)])


@microkernel("viiiiii")
def decode_run(e, code, codes, first_channel, run, scale_and_minimum, target):
    """Undo encode_run into float32."""

    def case(kind):
        def write():
            scale, minimum = (e.b.fpext(e.load(place, F16, 1), F32) for place in _two(e, scale_and_minimum))
            for lanes, start, stop in _loops(e, run):
                with e.loop(start, stop, lanes) as i:
                    found = _load_codes(e, codes, e.b.add(first_channel, i), lanes, kind)
                    value = _decode(e, found, e.splat(scale, lanes), e.splat(minimum, lanes), kind)
                    e.store(value, e.at(target, i, 4))

        return write

    e.switch(code, [case(kind) for kind in range(3)])


def _two(e: Emitter, address: Any) -> tuple[Any, Any]:
    return e.load(address, I64, 1), e.load(e.b.add(address, e.i64(8)), I64, 1)


@device
def code_keys(args: int, scratch: int, values: int, packed: int, first_code: int, first_group: int, forth: int) -> None:
    """One head's keys into codes or back; both indices count from the start of the block."""
    tokens, channels = arg(args, BLOCK_TOKENS), arg(args, CHANNELS)
    number_format = arg(args, VALUES_FORMAT)
    row_bytes, step = channels * item_bytes(number_format), ((channels + 15) & -16) * 4
    codes, code_stride = packed + first_code * arg(args, CODE_BITS) // 8, channels * arg(args, CODE_BITS) // 8
    rows = scratch + 16
    store_int(scratch, packed + arg(args, SCALES) + 2 * first_group)
    store_int(scratch + 8, packed + arg(args, MINIMA) + 2 * first_group)
    if forth:
        for token in range(tokens):
            load_row(number_format, values + token * row_bytes, channels, 1.0, rows + token * step)
        encode_keys(arg(args, CODE), rows, step, tokens, channels, codes, code_stride, scratch)
    else:
        decode_keys(arg(args, CODE), codes, code_stride, tokens, channels, scratch, rows)
        for token in range(tokens):
            store_row(number_format, rows + token * step, channels, 1.0, values + token * row_bytes)


@device
def code_value(
    args: int, scratch: int, values: int, packed: int, first_code: int, first_group: int, forth: int
) -> None:
    """One token's values of one head into codes or back; both indices count from the start of the block."""
    channels, run, number_format = arg(args, CHANNELS), arg(args, RUN), arg(args, VALUES_FORMAT)
    codes, row = packed + first_code * arg(args, CODE_BITS) // 8, scratch + 16
    if forth:
        load_row(number_format, values, channels, 1.0, row)
    for group in range(channels // run):
        place = packed + 2 * (first_group + group)
        store_int(scratch, place + arg(args, SCALES))
        store_int(scratch + 8, place + arg(args, MINIMA))
        if forth:
            encode_run(arg(args, CODE), row + group * run * 4, run, codes, group * run, scratch)
        else:
            decode_run(arg(args, CODE), codes, group * run, run, scratch, row + group * run * 4)
    if not forth:
        store_row(number_format, row, channels, 1.0, values)


@device
def code_layers(args: int, forth: int) -> None:
    """Take layers of blocks until none is left."""
    scratch = arg(args, SCRATCH) + fetch_add(args + 8 * WORKER, 1) * arg(args, SCRATCH_BYTES)
    layers, heads, tokens, channels = (
        arg(args, LAYERS),
        arg(args, KV_HEADS),
        arg(args, BLOCK_TOKENS),
        arg(args, CHANNELS),
    )
    head_values = tokens * channels
    groups = channels // arg(args, RUN)
    item = item_bytes(arg(args, VALUES_FORMAT))
    ticket = fetch_add(args + 8 * TICKET, 1)
    while ticket < arg(args, COUNT) * layers:
        block, layer = ticket // layers, ticket % layers
        packed = arg(args, PACKED) + block * arg(args, PACKED_STRIDE)
        code = layer * 2 * heads * head_values  # counts values from the start of the block
        group = layer * heads * (channels + tokens * groups)
        place = arg(args, VALUES) + (block * layers * 2 * heads * head_values + code) * item
        for _ in range(heads):
            code_keys(args, scratch, place, packed, code, group, forth)
            code, group, place = code + head_values, group + channels, place + head_values * item
        for _ in range(heads * tokens):
            code_value(args, scratch, place, packed, code, group, forth)
            code, group, place = code + channels, group + groups, place + channels * item
        ticket = fetch_add(args + 8 * TICKET, 1)


@device
def quantize_blocks(args: int) -> None:
    """Plain blocks into codes."""
    code_layers(args, 1)


@device
def dequantize_blocks(args: int) -> None:
    """Codes into plain blocks."""
    code_layers(args, 0)
