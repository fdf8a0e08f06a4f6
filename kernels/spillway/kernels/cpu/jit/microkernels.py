"""The inner loops of attention, over float32 scratch that fits the first-level caches.

Panels: keys and values are laid out as ``[n / 16][k][16]``, so a tile of the product reads one panel from end to end.
"""

from typing import Any

from llvmlite import ir

from spillway.kernels.cpu.formats import BFLOAT16, FLOAT32, ITEM_BYTES
from spillway.kernels.cpu.jit.emit import F32, I32, LANES, Emitter, microkernel, vector
from spillway.kernels.cpu.jit.formats import FLOATS, RAW, load_float, store_float, widen

FEW_ROWS = 4  # a decode step's rows per key head are handled four at a time
TILE_ROWS = 6  # 6 rows x 16 lanes of sums, one row of the panel and one splat fill the 16 registers of AVX2
NEGATIVE = -1.0e30  # below any real score: an empty row's maximum
MASKED = -3.0e38  # a hidden key's score: exp2(MASKED - NEGATIVE) is 0


def _tile(e: Emitter, a: list[Any], panel: Any, panel_stride: Any, k: Any, start: list[list[Any]], kind: int) -> Any:
    """start[r] + a[r][0:k] . panel[0:k] as one chain of fused multiply-adds per lane, in the order of k.

    ``start`` and the result hold a vector of 16 lanes per row and per 16 columns of the panel.
    """
    sums = [[e.variable(value) for value in row] for row in start]
    with e.loop(e.i64(0), k) as i:
        address = e.b.add(panel, e.b.mul(i, panel_stride))
        columns = [
            load_float(e, e.b.add(address, e.i64(c * LANES * ITEM_BYTES[kind])), kind) for c in range(len(start[0]))
        ]
        for row, slots in zip(a, sums, strict=True):
            factor = e.splat(e.load(e.at(row, i, 4), F32, 1))
            for column, slot in zip(columns, slots, strict=True):
                e.b.store(e.fma(factor, column, e.b.load(slot)), slot)
    return [[e.b.load(slot) for slot in row] for row in sums]


def request(e: Emitter, address: Any, size_bytes: Any) -> None:
    """Ask for memory that is needed soon."""
    pointer = ir.IntType(8).as_pointer()
    function = e.declare("llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32]))
    hints = [ir.Constant(I32, n) for n in (0, 3, 1)]  # for reading, to be kept close, data
    with e.loop(e.i64(0), size_bytes, 64) as offset:
        e.b.call(function, [e.b.inttoptr(e.b.add(address, offset), pointer), *hints])


def _rows(e: Emitter, address: Any, stride: Any, rows: int) -> list[Any]:
    return [e.b.add(address, e.b.mul(stride, e.i64(r))) for r in range(rows)]


def _zeros(rows: int) -> list[Any]:
    return [ir.Constant(vector(F32, LANES), [ir.Constant(F32, 0.0)] * LANES)] * rows


@microkernel("viiiiiiii")
def product(e, rows, a, a_stride, panel, panel_stride, k, c, c_stride):
    """c[r][0:16] = a[r][0:k] . panel for 1 to TILE_ROWS rows; strides in bytes."""

    def case(n):
        def write():
            sums = _tile(e, _rows(e, a, a_stride, n), panel, panel_stride, k, [_zeros(1)] * n, FLOAT32)
            for (value,), address in zip(sums, _rows(e, c, c_stride, n), strict=True):
                e.store(value, address)

        return write

    e.switch(e.b.sub(rows, e.i64(1)), [case(n) for n in range(1, TILE_ROWS + 1)])


@microkernel("viiiiiiiiii")
def values_onto(e, kind_and_rows, a, a_stride, values, values_stride, k, c, c_stride, channels, ahead):
    """c[r][0:channels] continues its chains: c[r] + a[r][0:k] . values, read in their own format.

    ``kind_and_rows`` is the format times FEW_ROWS plus the rows less one, ``channels`` a multiple of 16. As many bytes
    as are read are asked for at ``ahead``.
    """

    def tile(kind, rows, columns, start, stop):
        width = columns * LANES
        with e.loop(start, stop, width) as channel:
            request(
                e,
                e.b.add(ahead, e.b.mul(e.at(e.i64(0), channel, ITEM_BYTES[kind]), k)),
                e.b.mul(k, e.i64(width * ITEM_BYTES[kind])),
            )
            addresses = _rows(e, e.at(c, channel, 4), c_stride, rows)
            begin = [[e.load(e.b.add(row, e.i64(i * LANES * 4))) for i in range(columns)] for row in addresses]
            panel = e.at(values, channel, ITEM_BYTES[kind])
            sums = _tile(e, _rows(e, a, a_stride, rows), panel, values_stride, k, begin, kind)
            for row, address in zip(sums, addresses, strict=True):
                for i, value in enumerate(row):
                    e.store(value, e.b.add(address, e.i64(i * LANES * 4)))

    def case(kind, rows):
        def write():
            if rows > 2:
                tile(kind, rows, 1, e.i64(0), channels)
            else:  # few rows: two panels at a time, so that enough chains run side by side
                pairs = e.b.and_(channels, e.i64(-2 * LANES))
                tile(kind, rows, 2, e.i64(0), pairs)
                tile(kind, rows, 1, pairs, channels)

        return write

    e.switch(kind_and_rows, [case(kind, rows + 1) for kind in FLOATS for rows in range(FEW_ROWS)])


@microkernel("viiiiiiiiii")
def product_merged(e, rows, a, a_stride, panel, panel_stride, k, c, c_stride, old_weights, new_weights):
    """c[r] = c[r] * old_weights[r] + (a[r] . panel) * new_weights[r]."""

    def case(n):
        def write():
            sums = _tile(e, _rows(e, a, a_stride, n), panel, panel_stride, k, [_zeros(1)] * n, FLOAT32)
            for r, ((value,), address) in enumerate(zip(sums, _rows(e, c, c_stride, n), strict=True)):
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


TURNED = (4, 8, 4, 4, 4)  # channels that _turn takes at once, per format


def _turn(e: Emitter, base: Any, stride: Any, kind: int) -> list[Any]:
    """A few channels (TURNED) of eight tokens as vectors over the tokens.

    Tokens t and t + 4 share a register from the start (AVX inserts the upper half while loading), which leaves two
    rounds of shuffles within halves and few registers in use. Two neighbours in bfloat16 travel as one number of 32
    bits and part at the end.
    """
    b = e.b
    raw = I32 if kind == BFLOAT16 else RAW[kind]
    halves = [e.load(b.add(base, b.mul(stride, e.i64(t))), raw, 4) for t in range(8)]
    pairs = [e.shuffle(halves[t], halves[t + 4], list(range(8))) for t in range(4)]
    if kind != BFLOAT16:
        pairs = [widen(e, pair, kind) for pair in pairs]
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    even_low, even_high = e.shuffle(pairs[0], pairs[1], low), e.shuffle(pairs[0], pairs[1], high)
    odd_low, odd_high = e.shuffle(pairs[2], pairs[3], low), e.shuffle(pairs[2], pairs[3], high)
    first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    turned = [
        e.shuffle(even_low, odd_low, first),
        e.shuffle(even_low, odd_low, second),
        e.shuffle(even_high, odd_high, first),
        e.shuffle(even_high, odd_high, second),
    ]
    if kind != BFLOAT16:
        return turned
    wide = vector(F32, 8)
    sixteen, upper = e.const(turned[0], 16), e.const(turned[0], -65536)
    return [b.bitcast(half, wide) for pair in turned for half in (b.shl(pair, sixteen), b.and_(pair, upper))]


@microkernel("viiiiiii")
def transpose_panel(e, number_format, first, second, stride, channels, panel, ahead):
    """Sixteen tokens' keys as ``panel[channel][16]``: tokens 0-7 start at ``first``, 8-15 at ``second``.

    ``channels`` is a multiple of 8, ``stride`` the bytes from one token to the next. As many bytes as are read are
    asked for at ``ahead``.
    """

    def case(kind):
        def write():
            item = ITEM_BYTES[kind]
            step = TURNED[kind]
            with e.loop(e.i64(0), channels, step) as channel:
                request(e, e.at(ahead, channel, 16 * item), e.i64(step * 16 * item))
                for half, base in enumerate((first, second)):
                    target = e.b.add(e.at(panel, channel, LANES * 4), e.i64(half * 32))
                    for c, column in enumerate(_turn(e, e.at(base, channel, item), stride, kind)):
                        e.store(column, e.b.add(target, e.i64(c * LANES * 4)))

        return write

    e.switch(number_format, [case(kind) for kind in range(len(ITEM_BYTES))])


@microkernel("viiiiiiiiii")
def score_few(e, kind_and_rows, first, second, stride, channels, q, q_stride, scores, scores_stride, ahead):
    """Scores of up to FEW_ROWS queries with sixteen keys, turned in registers on the way: as transpose and product.

    Keys as in transpose_panel, ``kind_and_rows`` and ``ahead`` as in values_onto.
    """

    def case(kind, rows):
        def write():
            item = ITEM_BYTES[kind]
            zero = ir.Constant(vector(F32, 8), [ir.Constant(F32, 0.0)] * 8)
            sums = [[e.variable(zero) for _ in range(rows)] for _ in range(2)]
            queries = _rows(e, q, q_stride, rows)
            step = TURNED[kind]
            with e.loop(e.i64(0), channels, step) as channel:
                request(e, e.at(ahead, channel, 16 * item), e.i64(step * 16 * item))
                for base, slots in zip((first, second), sums, strict=True):
                    for i, column in enumerate(_turn(e, e.at(base, channel, item), stride, kind)):
                        for query, slot in zip(queries, slots, strict=True):
                            factor = e.load(e.b.add(e.at(query, channel, 4), e.i64(4 * i)), F32, 1)
                            e.b.store(e.fma(e.splat(factor, 8), column, e.b.load(slot)), slot)
            for half, slots in enumerate(sums):
                for r, slot in enumerate(slots):
                    place = e.b.add(e.b.add(scores, e.b.mul(scores_stride, e.i64(r))), e.i64(half * 32))
                    e.store(e.b.load(slot), place)

        return write

    e.switch(kind_and_rows, [case(kind, rows + 1) for kind in FLOATS for rows in range(FEW_ROWS)])


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
            for lanes, start, stop in e.split(channels):
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
            for lanes, start, stop in e.split(channels):
                with e.loop(start, stop, lanes) as i:
                    value = e.b.fmul(e.load(e.at(source, i, 4), F32, lanes), e.splat(factor, lanes))
                    store_float(e, value, e.at(target, i, item), kind)

        return write

    e.switch(number_format, [case(kind) for kind in FLOATS])
