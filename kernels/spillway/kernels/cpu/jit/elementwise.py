"""Norms, activation and rotary: one row at a time, its arithmetic spelled out: its bits depend on the row alone."""

from typing import Any

from llvmlite import ir

from spillway.kernels.cpu.elementwise_layout import (
    BLOCK_STRIDE,
    BLOCK_TOKENS,
    COS_SIN,
    COS_STRIDE,
    EPS,
    HALF,
    HEAD_STRIDE,
    INVERSE,
    K_NORM,
    KEYS,
    KV_HEADS,
    OUT,
    OUT_STRIDE,
    POOL_FORMAT,
    POSITIONS,
    Q_HEADS,
    Q_NORM,
    ROWS,
    ROWS_A_TASK,
    SECOND,
    SECOND_STRIDE,
    SLOTS,
    VALUES,
    WEIGHT,
    WIDTH,
    X_STRIDE,
    X,
)
from spillway.kernels.cpu.formats import BFLOAT16, FLOAT16, FLOAT32, ITEM_BYTES
from spillway.kernels.cpu.jit.emit import F32, LANES, Emitter, microkernel, vector
from spillway.kernels.cpu.jit.formats import store_float
from spillway.kernels.cpu.jit.scalars import fetch_add, load_float32, load_int
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.launch import TICKET

HALF_LANES = 8
"""Rotary pairs are taken eight at a time: half a head of 16 channels still fills the lanes."""
LOG2_E = 1.4426950408889634


def _inverse_root(e: Emitter, squares: Any, inverse: Any, eps: Any) -> Any:
    """1 / sqrt(mean + eps), in every lane."""
    mean = e.b.fmul(e.sum_lanes(e.b.load(squares)), inverse)
    return e.b.fdiv(ir.Constant(F32, 1.0), e.sqrt(e.b.fadd(mean, eps)))


def _zeros(lanes: int) -> Any:
    return ir.Constant(vector(F32, lanes), [ir.Constant(F32, 0.0)] * lanes)


@microkernel("viiiiff")
def norm_row(e, x, weight, out, width, inverse, eps):
    """out = weight * (x / rms(x)); width a multiple of 16; out may be x."""
    squares = e.variable(_zeros(LANES))
    with e.loop(e.i64(0), width, LANES) as i:
        h = e.load(e.at(x, i, 4))
        e.b.store(e.fma(h, h, e.b.load(squares)), squares)
    factor = e.splat(_inverse_root(e, squares, inverse, eps))
    with e.loop(e.i64(0), width, LANES) as i:
        scaled = e.b.fmul(e.load(e.at(x, i, 4)), factor)
        e.store(e.b.fmul(e.load(e.at(weight, i, 4)), scaled), e.at(out, i, 4))


@microkernel("viii")
def add_row(e, x, residual, width):
    """residual += x."""
    with e.loop(e.i64(0), width, LANES) as i:
        e.store(e.b.fadd(e.load(e.at(residual, i, 4)), e.load(e.at(x, i, 4))), e.at(residual, i, 4))


@device
def rms_norm(args: int) -> None:
    """Take rows until none is left; with a residual, the row is added to it first and the sum is normalized."""
    rows, width, some = load_int(args + 8 * ROWS), load_int(args + 8 * WIDTH), load_int(args + 8 * ROWS_A_TASK)
    residual, weight = load_int(args + 8 * SECOND), load_int(args + 8 * WEIGHT)
    inverse, eps = load_float32(args + 8 * INVERSE), load_float32(args + 8 * EPS)
    first = fetch_add(args + 8 * TICKET, 1) * some
    while first < rows:
        for row in range(first, min(first + some, rows)):
            source = load_int(args + 8 * X) + row * load_int(args + 8 * X_STRIDE)
            if residual != 0:
                target = residual + row * load_int(args + 8 * SECOND_STRIDE)
                add_row(source, target, width)
                source = target
            norm_row(
                source, weight, load_int(args + 8 * OUT) + row * load_int(args + 8 * OUT_STRIDE), width, inverse, eps
            )
        first = fetch_add(args + 8 * TICKET, 1) * some


@microkernel("viiii")
def silu_mul_row(e, gate, up, out, width):
    """out = gate / (1 + exp(-gate)) * up."""
    with e.loop(e.i64(0), width, LANES) as i:
        g = e.load(e.at(gate, i, 4))
        power = e.exp2(e.b.fmul(g, e.const(g, -LOG2_E)))
        silu = e.b.fdiv(g, e.b.fadd(e.const(g, 1.0), power))
        e.store(e.b.fmul(silu, e.load(e.at(up, i, 4))), e.at(out, i, 4))


@device
def silu_mul(args: int) -> None:
    """Take rows until none is left."""
    rows, width, some = load_int(args + 8 * ROWS), load_int(args + 8 * WIDTH), load_int(args + 8 * ROWS_A_TASK)
    first = fetch_add(args + 8 * TICKET, 1) * some
    while first < rows:
        for row in range(first, min(first + some, rows)):
            gate = load_int(args + 8 * X) + row * load_int(args + 8 * X_STRIDE)
            silu_mul_row(
                gate, gate + 4 * width, load_int(args + 8 * OUT) + row * load_int(args + 8 * OUT_STRIDE), width
            )
        first = fetch_add(args + 8 * TICKET, 1) * some


def _head(name: str, number_format: int, *, rotated: bool) -> Any:
    """A head into a number format: normalized if it has a weight, its first 2 * half channels rotated if asked.

    Signature: source, weight (0: none), cos_sin, half, channels, target; 1 / channels and eps of the norm.
    """
    item = ITEM_BYTES[number_format]

    def write(e: Emitter, source, weight, cos_sin, half, channels, target, inverse, eps):
        one = ir.Constant(vector(F32, HALF_LANES), [ir.Constant(F32, 1.0)] * HALF_LANES)
        factor = e.variable(one)
        with e.when(e.b.icmp_signed("!=", weight, e.i64(0))):
            squares = e.variable(_zeros(HALF_LANES))
            with e.loop(e.i64(0), channels, HALF_LANES) as i:
                h = e.load(e.at(source, i, 4), F32, HALF_LANES)
                e.b.store(e.fma(h, h, e.b.load(squares)), squares)
            e.b.store(e.splat(_inverse_root(e, squares, inverse, eps), HALF_LANES), factor)

        def channel(i: Any) -> Any:
            value = e.variable(e.load(e.at(source, i, 4), F32, HALF_LANES))
            with e.when(e.b.icmp_signed("!=", weight, e.i64(0))):
                scaled = e.b.fmul(e.b.load(value), e.b.load(factor))
                e.b.store(e.b.fmul(e.load(e.at(weight, i, 4), F32, HALF_LANES), scaled), value)
            return e.b.load(value)

        if rotated:
            with e.loop(e.i64(0), half, HALF_LANES) as i:
                paired = e.b.add(i, half)
                first, second = channel(i), channel(paired)
                cos = e.load(e.at(cos_sin, i, 4), F32, HALF_LANES)
                sin = e.load(e.at(cos_sin, paired, 4), F32, HALF_LANES)
                one_way = e.b.fsub(e.b.fmul(first, cos), e.b.fmul(second, sin))
                other = e.b.fadd(e.b.fmul(second, cos), e.b.fmul(first, sin))
                store_float(e, one_way, e.at(target, i, item), number_format)
                store_float(e, other, e.at(target, paired, item), number_format)
        start = e.b.mul(half, e.i64(2)) if rotated else e.i64(0)
        with e.loop(start, channels, HALF_LANES) as i:
            store_float(e, channel(i), e.at(target, i, item), number_format)

    write.__name__ = name
    return microkernel("viiiiiiff")(write)


query_head = _head("query_head", FLOAT32, rotated=True)
key_head_f32 = _head("key_head_f32", FLOAT32, rotated=True)
key_head_bf16 = _head("key_head_bf16", BFLOAT16, rotated=True)
key_head_f16 = _head("key_head_f16", FLOAT16, rotated=True)
value_head_f32 = _head("value_head_f32", FLOAT32, rotated=False)
value_head_bf16 = _head("value_head_bf16", BFLOAT16, rotated=False)
value_head_f16 = _head("value_head_f16", FLOAT16, rotated=False)
FORMAT_F32, FORMAT_BF16 = FLOAT32, BFLOAT16


@device
def write_token(args: int, source: int, cos_sin: int, slot: int) -> None:
    """Keys and values of one token into its slot of the pool."""
    kv_heads, channels, half = load_int(args + 8 * KV_HEADS), load_int(args + 8 * WIDTH), load_int(args + 8 * HALF)
    norm, number_format = load_int(args + 8 * K_NORM), load_int(args + 8 * POOL_FORMAT)
    inverse, eps = load_float32(args + 8 * INVERSE), load_float32(args + 8 * EPS)
    item = 4 if number_format == FORMAT_F32 else 2
    block = slot // load_int(args + 8 * BLOCK_TOKENS)
    place = block * load_int(args + 8 * BLOCK_STRIDE) + (slot % load_int(args + 8 * BLOCK_TOKENS)) * channels * item
    for head in range(kv_heads):
        key = source + head * channels * 4
        value = key + kv_heads * channels * 4
        k_place = load_int(args + 8 * KEYS) + place + head * load_int(args + 8 * HEAD_STRIDE)
        v_place = load_int(args + 8 * VALUES) + place + head * load_int(args + 8 * HEAD_STRIDE)
        if number_format == FORMAT_F32:
            key_head_f32(key, norm, cos_sin, half, channels, k_place, inverse, eps)
            value_head_f32(value, 0, 0, 0, channels, v_place, inverse, eps)
        elif number_format == FORMAT_BF16:
            key_head_bf16(key, norm, cos_sin, half, channels, k_place, inverse, eps)
            value_head_bf16(value, 0, 0, 0, channels, v_place, inverse, eps)
        else:
            key_head_f16(key, norm, cos_sin, half, channels, k_place, inverse, eps)
            value_head_f16(value, 0, 0, 0, channels, v_place, inverse, eps)


@device
def rope_write_kv(args: int) -> None:
    """Take rows until none is left: q is finished in place, k and v go to the pool unless the slot is negative."""
    rows, some, channels = load_int(args + 8 * ROWS), load_int(args + 8 * ROWS_A_TASK), load_int(args + 8 * WIDTH)
    q_heads, half, norm = load_int(args + 8 * Q_HEADS), load_int(args + 8 * HALF), load_int(args + 8 * Q_NORM)
    inverse, eps = load_float32(args + 8 * INVERSE), load_float32(args + 8 * EPS)
    first = fetch_add(args + 8 * TICKET, 1) * some
    while first < rows:
        for row in range(first, min(first + some, rows)):
            source = load_int(args + 8 * X) + row * load_int(args + 8 * X_STRIDE)
            position = load_int(load_int(args + 8 * POSITIONS) + 8 * row)
            cos_sin = load_int(args + 8 * COS_SIN) + position * load_int(args + 8 * COS_STRIDE)
            slot = load_int(load_int(args + 8 * SLOTS) + 8 * row)
            if slot >= 0:
                write_token(args, source + q_heads * channels * 4, cos_sin, slot)
            for head in range(q_heads):
                place = source + head * channels * 4
                query_head(place, norm, cos_sin, half, channels, place, inverse, eps)
        first = fetch_add(args + 8 * TICKET, 1) * some
