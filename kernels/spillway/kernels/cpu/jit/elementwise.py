"""Norms, activation, rotary and the KV write: one row at a time, so that a row's bits depend on the row alone."""

from typing import Any

from llvmlite import ir

from spillway.kernels.cpu.elementwise_layout import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    COS_SIN,
    COS_SIN_STRIDE,
    EPS,
    FORMAT,
    HALF,
    HEAD_BYTES,
    HEAD_EPS,
    K_NORM,
    K_STRIDE,
    KV_HEADS,
    KV_SCALES,
    OUT,
    OUT_STRIDE,
    POOL_FORMAT,
    POSITIONS,
    Q_HEADS,
    Q_NORM,
    RESIDUAL,
    RESIDUAL_STRIDE,
    ROWS,
    ROWS_A_TICKET,
    SLOTS,
    TOKEN_BYTES,
    V_STRIDE,
    VALUES,
    WEIGHT,
    WIDTH,
    X_STRIDE,
    K,
    V,
    X,
)
from spillway.kernels.cpu.formats import FLOAT32, ITEM_BYTES
from spillway.kernels.cpu.jit.emit import F32, Emitter, microkernel, vector
from spillway.kernels.cpu.jit.formats import FLOATS, load_float, round_to, store_float
from spillway.kernels.cpu.jit.microkernels import load_row
from spillway.kernels.cpu.jit.scalars import fetch_add, load_double, load_float32, load_int
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import arg, item_bytes
from spillway.kernels.cpu.launch import SCRATCH, SCRATCH_BYTES, TICKET, WORKER

LOG2_E = 1.4426950408889634


def _zeros(lanes: int) -> Any:
    zero = ir.Constant(F32, 0.0)
    return zero if lanes == 1 else ir.Constant(vector(F32, lanes), [zero] * lanes)


def _inverse_root(e: Emitter, squares: Any, count: Any, eps: Any) -> Any:
    """1 / sqrt(squares / count + eps)."""
    mean = e.b.fdiv(squares, e.b.sitofp(count, F32))
    return e.b.fdiv(ir.Constant(F32, 1.0), e.sqrt(e.b.fadd(mean, eps)))


def _sum_of_squares(e: Emitter, address: Any, width: Any, kind: int) -> Any:
    """Sixteen lanes of chains, the lanes in halves, then what is left over, one by one."""
    item = ITEM_BYTES[kind]
    totals = []
    for lanes, start, stop in e.split(width):
        totals.append(e.variable(_zeros(lanes)))
        with e.loop(start, stop, lanes) as i:
            h = load_float(e, e.at(address, i, item), kind, lanes)
            e.b.store(e.fma(h, h, e.b.load(totals[-1])), totals[-1])
    whole, rest = (e.b.load(total) for total in totals)
    return e.b.fadd(e.sum_lanes(whole), rest)


@microkernel("viiiiif")
def norm_row(e, number_format, x, weight, out, width, eps):
    """out = weight * (x / rms(x)), the quotient rounded to the format first, as LlamaRMSNorm does; out may be x."""

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            factor = _inverse_root(e, _sum_of_squares(e, x, width, kind), width, eps)
            for lanes, start, stop in e.split(width):
                with e.loop(start, stop, lanes) as i:
                    scaled = e.b.fmul(load_float(e, e.at(x, i, item), kind, lanes), e.splat(factor, lanes))
                    weighed = e.b.fmul(load_float(e, e.at(weight, i, item), kind, lanes), round_to(e, scaled, kind))
                    store_float(e, weighed, e.at(out, i, item), kind)

        return write

    e.switch(number_format, [case(kind) for kind in FLOATS])


@microkernel("viiii")
def add_row(e, number_format, x, residual, width):
    """residual += x."""

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            for lanes, start, stop in e.split(width):
                with e.loop(start, stop, lanes) as i:
                    place = e.at(residual, i, item)
                    added = e.b.fadd(load_float(e, place, kind, lanes), load_float(e, e.at(x, i, item), kind, lanes))
                    store_float(e, added, place, kind)

        return write

    e.switch(number_format, [case(kind) for kind in FLOATS])


@microkernel("viiiii")
def silu_mul_row(e, number_format, gate, up, out, width):
    """out = gate / (1 + exp(-gate)) * up."""

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            for lanes, start, stop in e.split(width):
                with e.loop(start, stop, lanes) as i:
                    g = load_float(e, e.at(gate, i, item), kind, lanes)
                    power = e.exp2(e.b.fmul(g, e.const(g, -LOG2_E)))
                    silu = e.b.fdiv(g, e.b.fadd(e.const(g, 1.0), power))
                    product = e.b.fmul(silu, load_float(e, e.at(up, i, item), kind, lanes))
                    store_float(e, product, e.at(out, i, item), kind)

        return write

    e.switch(number_format, [case(kind) for kind in FLOATS])


@device
def next_rows(args: int) -> int:
    """The first row of the next ticket."""
    return fetch_add(args + 8 * TICKET, 1) * arg(args, ROWS_A_TICKET)


@device
def rms_norm(args: int) -> None:
    """Take rows until none is left; with a residual, the row is added to it first and the sum is normalized."""
    rows, width, number_format = arg(args, ROWS), arg(args, WIDTH), arg(args, FORMAT)
    residual, eps = arg(args, RESIDUAL), load_double(args + 8 * EPS)
    first = next_rows(args)
    while first < rows:
        for row in range(first, min(first + arg(args, ROWS_A_TICKET), rows)):
            source = arg(args, X) + row * arg(args, X_STRIDE)
            if residual != 0:
                sum_place = residual + row * arg(args, RESIDUAL_STRIDE)
                add_row(number_format, source, sum_place, width)
                source = sum_place
            norm_row(number_format, source, arg(args, WEIGHT), arg(args, OUT) + row * arg(args, OUT_STRIDE), width, eps)
        first = next_rows(args)


@device
def silu_mul(args: int) -> None:
    """Take rows until none is left."""
    rows, width, number_format = arg(args, ROWS), arg(args, WIDTH), arg(args, FORMAT)
    first = next_rows(args)
    while first < rows:
        for row in range(first, min(first + arg(args, ROWS_A_TICKET), rows)):
            gate = arg(args, X) + row * arg(args, X_STRIDE)
            up = gate + width * item_bytes(number_format)
            silu_mul_row(number_format, gate, up, arg(args, OUT) + row * arg(args, OUT_STRIDE), width)
        first = next_rows(args)


@microkernel("viiif")
def norm_head(e, head, weight, channels, eps):
    """RMS norm of one head in place, all in float32."""
    factor = _inverse_root(e, _sum_of_squares(e, head, channels, FLOAT32), channels, eps)
    for lanes, start, stop in e.split(channels):
        with e.loop(start, stop, lanes) as i:
            place = e.at(head, i, 4)
            scaled = e.b.fmul(e.load(place, F32, lanes), e.splat(factor, lanes))
            e.store(e.b.fmul(scaled, e.load(e.at(weight, i, 4), F32, lanes)), place)


@microkernel("viii")
def rotate_head(e, head, cos_sin, half):
    """Rotate channel i with i + half in place, by the angle whose cosine and sine are at i and i + half."""
    for lanes, start, stop in e.split(half):
        with e.loop(start, stop, lanes) as i:
            j = e.b.add(i, half)
            places = e.at(head, i, 4), e.at(head, j, 4)
            first, second = (e.load(place, F32, lanes) for place in places)
            cos, sin = (e.load(e.at(cos_sin, n, 4), F32, lanes) for n in (i, j))
            e.store(e.b.fsub(e.b.fmul(first, cos), e.b.fmul(second, sin)), places[0])
            e.store(e.b.fadd(e.b.fmul(second, cos), e.b.fmul(first, sin)), places[1])


@microkernel("viiifi")
def store_head(e, number_format, source, channels, scale, target):
    """Round a float32 head to a format; fp8 and int8 hold the value divided by ``scale``."""

    def case(kind):
        def write():
            for lanes, start, stop in e.split(channels):
                with e.loop(start, stop, lanes) as i:
                    value = e.load(e.at(source, i, 4), F32, lanes)
                    if kind not in FLOATS:
                        value = e.b.fdiv(value, e.splat(scale, lanes))
                    store_float(e, value, e.at(target, i, ITEM_BYTES[kind]), kind)

        return write

    e.switch(number_format, [case(kind) for kind in range(len(ITEM_BYTES))])


@device
def write_heads(args: int, head: int, source: int, pool: int, norm: int, cos_sin: int, scales: int) -> None:
    """All key or value heads of one token into the pool, by way of the float32 scratch ``head``."""
    number_format, channels = arg(args, FORMAT), arg(args, WIDTH)
    for n in range(arg(args, KV_HEADS)):
        load_row(number_format, source + n * channels * item_bytes(number_format), channels, 1.0, head)
        if norm != 0:
            norm_head(head, norm, channels, load_double(args + 8 * HEAD_EPS))
        if cos_sin != 0:
            rotate_head(head, cos_sin, arg(args, HALF))
        scale = load_float32(scales + 4 * n) if scales != 0 else 1.0
        store_head(arg(args, POOL_FORMAT), head, channels, scale, pool + n * arg(args, HEAD_BYTES))


@device
def write_token(args: int, head: int, row: int, k_norm: int, cos_sin: int) -> None:
    """One token's keys and values into its slot, unless that is negative."""
    slot = load_int(arg(args, SLOTS) + 8 * row)
    if slot < 0:
        return
    block = slot // arg(args, BLOCK_TOKENS)
    offset = slot - block * arg(args, BLOCK_TOKENS)
    keys = arg(args, OUT) + block * arg(args, BLOCK_BYTES) + offset * arg(args, TOKEN_BYTES)
    scales = arg(args, KV_SCALES)
    write_heads(args, head, arg(args, K) + row * arg(args, K_STRIDE), keys, k_norm, cos_sin, scales)
    if scales != 0:
        scales += 4 * arg(args, KV_HEADS)
    write_heads(args, head, arg(args, V) + row * arg(args, V_STRIDE), keys + arg(args, VALUES), 0, 0, scales)


@device
def finish_queries(args: int, head: int, row: int, q_norm: int, cos_sin: int) -> None:
    """One token's queries, normalized and rotated in place."""
    number_format, channels = arg(args, FORMAT), arg(args, WIDTH)
    for n in range(arg(args, Q_HEADS)):
        place = arg(args, X) + row * arg(args, X_STRIDE) + n * channels * item_bytes(number_format)
        load_row(number_format, place, channels, 1.0, head)
        if q_norm != 0:
            norm_head(head, q_norm, channels, load_double(args + 8 * HEAD_EPS))
        rotate_head(head, cos_sin, arg(args, HALF))
        store_head(number_format, head, channels, 1.0, place)


@device
def widened(args: int, weight: int, target: int) -> int:
    """A head norm's weight as float32 in the scratch; 0 stays 0."""
    if weight == 0:
        return 0
    load_row(arg(args, FORMAT), weight, arg(args, WIDTH), 1.0, target)
    return target


@device
def write_kv(args: int) -> None:
    """Take tokens until none is left: queries are finished (where there are any), keys and values written."""
    head = arg(args, SCRATCH) + fetch_add(args + 8 * WORKER, 1) * arg(args, SCRATCH_BYTES)
    step = ((arg(args, WIDTH) + 15) & -16) * 4
    q_norm = widened(args, arg(args, Q_NORM), head + step)
    k_norm = widened(args, arg(args, K_NORM), head + 2 * step)
    rows, table = arg(args, ROWS), arg(args, COS_SIN)
    first = next_rows(args)
    while first < rows:
        for row in range(first, min(first + arg(args, ROWS_A_TICKET), rows)):
            cos_sin = 0
            if table != 0:
                cos_sin = table + load_int(arg(args, POSITIONS) + 8 * row) * arg(args, COS_SIN_STRIDE)
            write_token(args, head, row, k_norm, cos_sin)
            finish_queries(args, head, row, q_norm, cos_sin)
        first = next_rows(args)
