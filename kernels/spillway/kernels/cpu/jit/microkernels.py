"""The inner loops of attention, over float32 scratch that fits the first-level caches.

Panels: keys and values are laid out as ``[n / 16][k][16]``, so a tile of the product reads one panel from end to end.
"""

from typing import Any

from llvmlite import ir

from spillway.kernels.cpu.formats import ITEM_BYTES
from spillway.kernels.cpu.jit.emit import F32, I32, LANES, Emitter, microkernel, vector
from spillway.kernels.cpu.jit.formats import load_float, store_float

TILE_ROWS = 6  # 6 rows x 16 lanes of sums, one row of the panel and one splat fill the 16 registers of AVX2
NEGATIVE = -1.0e30  # below any real score: an empty row's maximum
MASKED = -3.0e38  # a hidden key's score: exp2(MASKED - NEGATIVE) is 0


def _tile(e: Emitter, rows: int, a: list[Any], panel: Any, panel_stride: Any, k: Any, start: list[Any]) -> list[Any]:
    """start[r] + a[r][0:k] . panel[0:k] as one chain of fused multiply-adds per lane, in the order of k."""
    sums = [e.variable(value) for value in start]
    with e.loop(e.i64(0), k) as i:
        row = e.load(e.b.add(panel, e.b.mul(i, panel_stride)), F32, LANES)
        for r in range(rows):
            factor = e.splat(e.load(e.at(a[r], i, 4), F32, 1))
            e.b.store(e.fma(factor, row, e.b.load(sums[r])), sums[r])
    return [e.b.load(slot) for slot in sums]


def _rows(e: Emitter, address: Any, stride: Any, rows: int) -> list[Any]:
    return [e.b.add(address, e.b.mul(stride, e.i64(r))) for r in range(rows)]


def _zeros(rows: int) -> list[Any]:
    return [ir.Constant(vector(F32, LANES), [ir.Constant(F32, 0.0)] * LANES)] * rows


@microkernel("viiiiiiii")
def product(e, rows, a, a_stride, panel, panel_stride, k, c, c_stride):
    """c[r][0:16] = a[r][0:k] . panel for 1 to TILE_ROWS rows; strides in bytes."""

    def case(n):
        def write():
            sums = _tile(e, n, _rows(e, a, a_stride, n), panel, panel_stride, k, _zeros(n))
            for value, address in zip(sums, _rows(e, c, c_stride, n), strict=True):
                e.store(value, address)

        return write

    e.switch(e.b.sub(rows, e.i64(1)), [case(n) for n in range(1, TILE_ROWS + 1)])


@microkernel("viiiiiiii")
def product_onto(e, rows, a, a_stride, panel, panel_stride, k, c, c_stride):
    """c[r][0:16] continues its chain: c[r] + a[r][0:k] . panel."""

    def case(n):
        def write():
            addresses = _rows(e, c, c_stride, n)
            start = [e.load(address) for address in addresses]
            sums = _tile(e, n, _rows(e, a, a_stride, n), panel, panel_stride, k, start)
            for value, address in zip(sums, addresses, strict=True):
                e.store(value, address)

        return write

    e.switch(e.b.sub(rows, e.i64(1)), [case(n) for n in range(1, TILE_ROWS + 1)])


@microkernel("viiiiiiiiii")
def product_merged(e, rows, a, a_stride, panel, panel_stride, k, c, c_stride, old_weights, new_weights):
    """c[r] = c[r] * old_weights[r] + (a[r] . panel) * new_weights[r]."""

    def case(n):
        def write():
            sums = _tile(e, n, _rows(e, a, a_stride, n), panel, panel_stride, k, _zeros(n))
            for r, (value, address) in enumerate(zip(sums, _rows(e, c, c_stride, n), strict=True)):
                old = e.splat(e.load(e.at(old_weights, e.i64(r), 4), F32, 1))
                new = e.splat(e.load(e.at(new_weights, e.i64(r), 4), F32, 1))
                e.store(e.fma(e.load(address), old, e.b.fmul(value, new)), address)

        return write

    e.switch(e.b.sub(rows, e.i64(1)), [case(n) for n in range(1, TILE_ROWS + 1)])


@microkernel("viiiff")
def merge_row(e, source, target, floats, old_weight, new_weight):
    """target = target * old + source * new over a multiple of 16 floats: the last step of product_merged."""
    old, new = e.splat(old_weight), e.splat(new_weight)
    with e.loop(e.i64(0), floats, LANES) as i:
        address = e.at(target, i, 4)
        e.store(e.fma(e.load(address), old, e.b.fmul(e.load(e.at(source, i, 4)), new)), address)


def _transpose_8x8(e: Emitter, rows: list[Any]) -> list[Any]:
    """Eight vectors of eight lanes, transposed in three rounds of shuffles that AVX has as single instructions."""
    for low, high, distance in (
        ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15], 1),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15], 2),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15], 4),
    ):
        turned: list[Any] = [None] * 8
        for i in range(8):
            if not i & distance:
                first, second = (rows[i], rows[i + distance])
                turned[i] = e.shuffle(first, second, low)
                turned[i + distance] = e.shuffle(first, second, high)
        rows = turned
    # the first round leaves columns 1 and 2, 5 and 6 of each group exchanged
    return [rows[i] for i in (0, 2, 1, 3, 4, 6, 5, 7)]


@microkernel("viiiiii")
def transpose_panel(e, number_format, first, second, stride, channels, panel):
    """Sixteen tokens' keys as ``panel[channel][16]``: tokens 0-7 start at ``first``, 8-15 at ``second``.

    ``channels`` is a multiple of 8, ``stride`` the bytes from one token to the next.
    """

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            with e.loop(e.i64(0), channels, 8) as channel:
                for half, base in enumerate((first, second)):
                    rows = [
                        load_float(e, e.at(e.b.add(base, e.b.mul(stride, e.i64(t))), channel, item), kind, 8)
                        for t in range(8)
                    ]
                    target = e.b.add(e.at(panel, channel, LANES * 4), e.i64(half * 32))
                    for c, column in enumerate(_transpose_8x8(e, rows)):
                        e.store(column, e.b.add(target, e.i64(c * LANES * 4)))

        return write

    e.switch(number_format, [case(kind) for kind in range(len(ITEM_BYTES))])


@microkernel("viiiiii")
def copy_row(e, number_format, source, channels, target, target_stride, padded_channels):
    """One token's numbers as float32, 16 channels to each ``target + n * target_stride``, zeros behind the last."""

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            full = e.b.and_(channels, e.i64(-LANES))

            def place(channel):
                group, lane = e.b.ashr(channel, e.i64(4)), e.b.and_(channel, e.i64(15))
                return e.at(e.b.add(target, e.b.mul(group, target_stride)), lane, 4)

            with e.loop(e.i64(0), full, LANES) as channel:
                e.store(load_float(e, e.at(source, channel, item), kind), place(channel))
            with e.loop(full, channels) as channel:
                e.store(load_float(e, e.at(source, channel, item), kind, 1), place(channel))
            with e.loop(channels, padded_channels) as channel:
                e.store(ir.Constant(F32, 0.0), place(channel))

        return write

    e.switch(number_format, [case(kind) for kind in range(len(ITEM_BYTES))])


@microkernel("viiiiiiffi")
def prepare_scores(e, scores, first, last, low, high, sinks, soft_cap, slope, distance):
    """Cap, bias and hide in place: scores[first:last], multiples of 16, in units of log2.

    Columns in [low, high) or [0, sinks) are visible, the rest become MASKED. With a cap, scores arrive as
    2 log2(e) / cap times the plain score and soft_cap is cap * log2(e); slope is in log2 units; column c lies
    ``c - distance`` tokens behind (negative) or at the row's own position.
    """
    b = e.b
    capped = b.fcmp_ordered(">", soft_cap, ir.Constant(F32, 0.0))
    biased = b.fcmp_ordered("!=", slope, ir.Constant(F32, 0.0))
    narrow = [b.trunc(value, I32) for value in (low, high, sinks, distance)]
    low32, high32, sinks32, distance32 = [e.splat(value) for value in narrow]
    with e.loop(first, last, LANES) as column:
        address = e.at(scores, column, 4)
        slot = e.variable(e.load(address))
        index = b.add(e.splat(b.trunc(column, I32)), e.lane_numbers())
        with e.when(capped):
            grown = e.exp2(b.load(slot))  # e^(2y); tanh(y) = 1 - 2 / (1 + e^(2y))
            one = e.const(grown, 1.0)
            tanh = b.fsub(one, b.fdiv(e.const(grown, 2.0), b.fadd(one, grown)))
            b.store(b.fmul(e.splat(soft_cap), tanh), slot)
        with e.when(biased):
            offset = b.sitofp(b.sub(index, distance32), vector(F32, LANES))
            b.store(e.fma(e.splat(slope), offset, b.load(slot)), slot)
        inside = b.and_(b.icmp_signed(">=", index, low32), b.icmp_signed("<", index, high32))
        visible = b.or_(inside, b.icmp_signed("<", index, sinks32))
        value = b.load(slot)
        e.store(b.select(visible, value, e.const(value, MASKED)), address)


@microkernel("fiii")
def row_max(e, scores, first, last):
    """Largest of scores[first:last] (multiples of 16), at least NEGATIVE."""
    best = e.variable(e.const(_zeros(1)[0], NEGATIVE))
    with e.loop(first, last, LANES) as column:
        e.b.store(e.larger(e.load(e.at(scores, column, 4)), e.b.load(best)), best)
    return e.max_lanes(e.b.load(best))


@microkernel("fiiif")
def exp2_row(e, scores, first, last, maximum):
    """scores[first:last] = 2^(score - maximum); returns their sum, lane by lane and then across."""
    total = e.variable(_zeros(1)[0])
    shift = e.splat(maximum)
    with e.loop(first, last, LANES) as column:
        address = e.at(scores, column, 4)
        weight = e.exp2(e.b.fsub(e.load(address), shift))
        e.store(weight, address)
        e.b.store(e.b.fadd(e.b.load(total), weight), total)
    return e.sum_lanes(e.b.load(total))


@microkernel("viiiiiii")
def merge_weights(e, rows, maxima, sums, new_maxima, new_sums, old_weights, new_weights):
    """Fold new softmax states into running ones, for rows padded to a multiple of 16 floats.

    maxima, sums become those of the union; the weights are what each side's output counts for.
    """
    with e.loop(e.i64(0), rows, LANES) as row:
        old, new = e.load(e.at(maxima, row, 4)), e.load(e.at(new_maxima, row, 4))
        both = e.larger(old, new)
        old_weight, new_weight = e.exp2(e.b.fsub(old, both)), e.exp2(e.b.fsub(new, both))
        total = e.fma(e.load(e.at(sums, row, 4)), old_weight, e.b.fmul(e.load(e.at(new_sums, row, 4)), new_weight))
        e.store(both, e.at(maxima, row, 4))
        e.store(total, e.at(sums, row, 4))
        e.store(old_weight, e.at(old_weights, row, 4))
        e.store(new_weight, e.at(new_weights, row, 4))


@microkernel("viiifi")
def load_row(e, number_format, source, channels, factor, target):
    """target[0:channels] = source * factor in float32, zeros up to the next multiple of 16."""

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            full = e.b.and_(channels, e.i64(-LANES))
            for lanes, start, stop in ((LANES, e.i64(0), full), (1, full, channels)):
                with e.loop(start, stop, lanes) as i:
                    value = load_float(e, e.at(source, i, item), kind, lanes)
                    e.store(e.b.fmul(value, e.splat(factor, lanes)), e.at(target, i, 4))

        return write

    padded = e.b.and_(e.b.add(channels, e.i64(LANES - 1)), e.i64(-LANES))
    with e.loop(channels, padded) as i:
        e.store(ir.Constant(F32, 0.0), e.at(target, i, 4))
    e.switch(number_format, [case(kind) for kind in range(len(ITEM_BYTES))])


@microkernel("viiifi")
def store_row(e, number_format, source, channels, factor, target):
    """target[0:channels] = source * factor, rounded to the format."""

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            full = e.b.and_(channels, e.i64(-LANES))
            for lanes, start, stop in ((LANES, e.i64(0), full), (1, full, channels)):
                with e.loop(start, stop, lanes) as i:
                    value = e.b.fmul(e.load(e.at(source, i, 4), F32, lanes), e.splat(factor, lanes))
                    store_float(e, value, e.at(target, i, item), kind)

        return write

    e.switch(number_format, [case(kind) for kind in range(3)])
