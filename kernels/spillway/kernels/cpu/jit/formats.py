"""Number formats in memory, as float32 lanes in registers and back."""

from typing import Any

from spillway.kernels.cpu.formats import BFLOAT16, FLOAT16, FLOAT32, INT8
from spillway.kernels.cpu.jit.emit import F16, F32, I8, I16, I32, LANES, Emitter, lanes_of, vector

FLOATS = (FLOAT32, BFLOAT16, FLOAT16)
RAW = (F32, I16, F16, I8, I8)  # what a format's numbers are loaded as


def load_float(e: Emitter, address: Any, number_format: int, lanes: int = LANES) -> Any:
    """Consecutive numbers of a format as float32 lanes."""
    return widen(e, e.load(address, RAW[number_format], lanes), number_format)


def widen(e: Emitter, raw: Any, number_format: int) -> Any:
    """Lanes as they lie in memory (of type RAW) as float32 lanes."""
    b = e.b
    wide, whole = vector(F32, lanes_of(raw)), vector(I32, lanes_of(raw))
    if number_format == FLOAT32:
        return raw
    if number_format == BFLOAT16:
        bits = b.zext(raw, whole)
        return b.bitcast(b.shl(bits, e.const(bits, 16)), wide)
    if number_format == FLOAT16:
        return b.fpext(raw, wide)
    if number_format == INT8:
        return b.sitofp(b.sext(raw, whole), wide)
    return fp8_to_float(e, b.zext(raw, whole))


def store_float(e: Emitter, value: Any, address: Any, number_format: int) -> None:
    """Round float32 lanes to a format, ties to even; fp8 and int8 saturate, as do no others."""
    b = e.b
    lanes = lanes_of(value)
    if number_format == FLOAT32:
        e.store(value, address)
    elif number_format == BFLOAT16:
        e.store(b.trunc(_bfloat16_bits(e, value), vector(I16, lanes)), address)
    elif number_format == FLOAT16:
        e.store(b.fptrunc(value, vector(F16, lanes)), address)
    elif number_format == INT8:
        inside = e.larger(e.const(value, -128.0), e.smaller(e.const(value, 127.0), value))
        e.store(b.trunc(b.fptosi(e.round_even(inside), vector(I32, lanes)), vector(I8, lanes)), address)
    else:
        e.store(b.trunc(float_to_fp8(e, value), vector(I8, lanes)), address)


def round_to(e: Emitter, value: Any, number_format: int) -> Any:
    """Float32 lanes rounded to what a 16-bit format can hold."""
    b = e.b
    if number_format == BFLOAT16:
        bits = _bfloat16_bits(e, value)
        return b.bitcast(b.shl(bits, e.const(bits, 16)), value.type)
    if number_format == FLOAT16:
        return b.fpext(b.fptrunc(value, vector(F16, lanes_of(value))), value.type)
    return value


def _bfloat16_bits(e: Emitter, value: Any) -> Any:
    """The upper half of each float, rounded, in the low 16 bits; NaN stays NaN whatever its payload."""
    b = e.b
    bits = b.bitcast(value, vector(I32, lanes_of(value)))
    odd = b.and_(b.lshr(bits, e.const(bits, 16)), e.const(bits, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, e.const(bits, 0x7FFF))), e.const(bits, 16))
    return b.select(b.fcmp_unordered("uno", value, value), e.const(bits, 0x7FC0), rounded)


def fp8_to_float(e: Emitter, code: Any) -> Any:
    """e4m3 codes (int32 lanes, 0 ... 255) as floats.

    Seven bits of exponent and mantissa moved to float16's place make the value / 256, subnormals included; the one
    code that is NaN (0x7f) is set apart.
    """
    b = e.b
    lanes = lanes_of(code)
    magnitude = b.and_(code, e.const(code, 0x7F))
    sign = b.shl(b.and_(code, e.const(code, 0x80)), e.const(code, 8))
    half = b.trunc(b.or_(sign, b.shl(magnitude, e.const(code, 7))), vector(I16, lanes))
    value = b.fpext(b.bitcast(half, vector(F16, lanes)), vector(F32, lanes))
    value = b.fmul(value, e.const(value, 256.0))
    return b.select(b.icmp_unsigned("==", magnitude, e.const(code, 0x7F)), e.const(value, float("nan")), value)


def float_to_fp8(e: Emitter, value: Any) -> Any:
    """Floats as e4m3 codes in int32 lanes, rounded to even, saturated at 448."""
    b = e.b
    whole = vector(I32, lanes_of(value))
    bits = b.bitcast(value, whole)
    sign = b.and_(b.lshr(bits, e.const(bits, 24)), e.const(bits, 0x80))
    size = e.absolute(value)
    size = e.smaller(e.const(size, 448.0), size)
    size_bits = b.bitcast(size, whole)
    odd = b.and_(b.lshr(size_bits, e.const(bits, 20)), e.const(bits, 1))
    normal = b.lshr(b.add(size_bits, b.add(odd, e.const(bits, 0x7FFFF))), e.const(bits, 20))
    normal = b.sub(normal, e.const(bits, (127 - 7) << 3))
    # below 2^-6 the steps are 2^-9: a count of them is the code
    steps = b.fptosi(e.round_even(b.fmul(size, e.const(size, 512.0))), whole)
    code = b.select(b.fcmp_ordered("<", size, e.const(size, 2.0**-6)), steps, normal)
    code = b.select(b.fcmp_unordered("uno", value, value), e.const(code, 0x7F), code)
    return b.or_(sign, code)
