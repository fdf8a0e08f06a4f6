"""Linear layers: rows times a packed weight, in the loop order of BLIS (Van Zee and van de Geijn, 2015).

k is cut into chunks whose length follows from k alone. In a chunk, every number of the output is one chain of fused
multiply-adds in ascending order; the chunks' sums are added in order, which rounds less than one chain over all would.
So neither tiles nor blocks nor threads show in the result.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from spillway.kernels.cpu.jit.emit import F32, I8, I32, LANES, Emitter, microkernel, vector
from spillway.kernels.cpu.jit.scalars import fetch_add, fill_bytes
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import arg
from spillway.kernels.cpu.launch import SCRATCH, SCRATCH_BYTES, WORKER
from spillway.kernels.cpu.linear_layout import (
    AT_SUMS,
    BFLOAT16_PANELS,
    BIAS,
    BLOCK_ROWS,
    BLOCKS,
    CHUNK,
    COLUMNS,
    GATED,
    GROUPS,
    K_STEP,
    NEXT_GROUPS,
    OUT,
    OUT_STRIDE,
    PANEL,
    PANEL_BYTES,
    PANEL_COUNT,
    PANELS,
    PITCH,
    PREFETCH_BYTES,
    RESIDUAL,
    RESIDUAL_STRIDE,
    ROWS,
    TILE_ROWS,
    VECTORS,
    WORKERS,
    X_STRIDE,
    K,
    X,
)

UNROLL = 4
SUM_BYTES = PANEL * 4  # of one row of a tile
_LOG2_E = 1.4426950408889634


def _prefetch(e: Emitter, address: Any) -> None:
    """Ask for a cache line; any address is allowed."""
    pointer = I8.as_pointer()
    function = e.declare("llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32]))
    numbers = [ir.Constant(I32, n) for n in (0, 3, 1)]  # to read, into every cache, data
    e.b.call(function, [e.b.inttoptr(address, pointer), *numbers])


def _load_row(e: Emitter, address: Any, bfloat16: bool) -> list[Any]:
    """One row of a panel. In bfloat16 a word holds columns j (low half) and j + 8, each a float's upper half."""
    b = e.b
    if not bfloat16:
        return [e.load(b.add(address, e.i64(v * LANES * 4))) for v in range(VECTORS)]
    row = []
    for v in range(VECTORS):
        words = e.load(b.add(address, e.i64(v * LANES * 2)), I32, LANES // 2)
        low = b.shl(words, e.const(words, 16))
        high = b.and_(words, e.const(words, -65536))
        row.append(b.bitcast(e.shuffle(low, high, list(range(LANES))), ir.VectorType(F32, LANES)))
    return row


def _tile(e: Emitter, rows: int, bfloat16: bool, a: Any, panel: Any, k: Any, sums: Any, ahead: Any, step: Any) -> None:
    b = e.b
    row_bytes = PANEL * (2 if bfloat16 else 4)
    zero = ir.Constant(vector(F32, LANES), [ir.Constant(F32, 0.0)] * LANES)
    slots = [[e.variable(zero) for _ in range(VECTORS)] for _ in range(rows)]
    factors, fetched = e.variable(a), e.variable(ahead)
    end = b.add(panel, b.mul(k, e.i64(row_bytes)))
    with e.loop(panel, end, row_bytes * UNROLL) as source:
        at = b.load(factors)
        for u in range(UNROLL):
            row = _load_row(e, b.add(source, e.i64(u * row_bytes)), bfloat16)
            for r in range(rows):
                factor = e.splat(e.load(b.add(at, e.i64(r * PITCH + u * 4)), F32, 1))
                for v in range(VECTORS):
                    b.store(e.fma(factor, row[v], b.load(slots[r][v])), slots[r][v])
            address = b.load(fetched)
            _prefetch(e, address)
            b.store(b.add(address, step), fetched)
        b.store(b.add(at, e.i64(UNROLL * 4)), factors)
    for r in range(rows):
        for v in range(VECTORS):
            place = b.add(sums, e.i64(r * SUM_BYTES + v * LANES * 4))
            e.store(b.fadd(e.load(place), b.load(slots[r][v])), place)


@microkernel("viiiiiiii")
def linear_tile(e, bfloat16, rows, a, panel, k, sums, ahead, step):
    """sums[r] += a[r][0:k] . panel[0:k], for 1 to TILE_ROWS rows PITCH bytes apart; k a multiple of UNROLL.

    After each k a cache line is fetched from ``ahead``, which then moves on by ``step`` bytes: a step that is smaller
    than a row of the panel spreads the fetching of the next chunk over all tiles of this one.
    """

    def case(wide, n):
        return lambda: _tile(e, n, wide, a, panel, k, sums, ahead, step)

    cases = [case(wide, n) for wide in (False, True) for n in range(1, TILE_ROWS + 1)]
    e.switch(e.b.add(e.b.sub(rows, e.i64(1)), e.b.mul(bfloat16, e.i64(TILE_ROWS))), cases)


@microkernel("viiii")
def copy_padded(e, source, target, count, padded):
    """target[0:padded] = source[0:count], then zeros."""
    full = e.b.and_(count, e.i64(-LANES))
    for lanes, start, stop in ((LANES, e.i64(0), full), (1, full, count)):
        with e.loop(start, stop, lanes) as i:
            e.store(e.load(e.at(source, i, 4), F32, lanes), e.at(target, i, 4))
    with e.loop(count, padded) as i:
        e.store(ir.Constant(F32, 0.0), e.at(target, i, 4))


def _biased(e: Emitter, sums: Any, bias: Any, column: Any, lanes: int) -> Any:
    """sums[column ...] + bias[column ...]; an address of 0 stands for no bias."""
    slot = e.variable(e.load(e.at(sums, column, 4), F32, lanes))
    with e.when(e.b.icmp_signed("!=", bias, e.i64(0))):
        e.b.store(e.b.fadd(e.b.load(slot), e.load(e.at(bias, column, 4), F32, lanes)), slot)
    return e.b.load(slot)


def _finish(e: Emitter, width: int, columns: Any, out: Any, residual: Any, value: Callable[[Any, int], Any]) -> None:
    """out[c] = value(c) + residual[c] for up to ``width`` columns."""
    b = e.b
    full = b.and_(columns, e.i64(-width))
    for lanes, start, stop in ((width, e.i64(0), full), (1, full, columns)):
        with e.loop(start, stop, lanes) as column:
            slot = e.variable(value(column, lanes))
            with e.when(b.icmp_signed("!=", residual, e.i64(0))):
                b.store(b.fadd(e.load(e.at(residual, column, 4), F32, lanes), b.load(slot)), slot)
            e.store(b.load(slot), e.at(out, column, 4))


@microkernel("viiiii")
def finish_plain(e, columns, sums, bias, out, residual):
    """out[c] = residual[c] + (sums[c] + bias[c]) for up to 16 columns; 0 for no bias or residual."""
    _finish(e, LANES, columns, out, residual, lambda column, lanes: _biased(e, sums, bias, column, lanes))


@microkernel("viiiii")
def finish_gated(e, columns, sums, bias, out, residual):
    """out[c] = residual[c] + silu(gate) * up for up to 8 columns: gate is sums[c] + bias[c], up the same at c + 8."""
    b = e.b

    def value(column, lanes):
        gate = _biased(e, sums, bias, column, lanes)
        up = _biased(e, sums, bias, b.add(column, e.i64(8)), lanes)
        shrunk = e.exp2(b.fmul(gate, e.const(gate, -_LOG2_E)))
        return b.fmul(b.fdiv(gate, b.fadd(e.const(gate, 1.0), shrunk)), up)

    _finish(e, 8, columns, out, residual, value)


@device
def finish_panel(args: int, sums: int, first_row: int, rows: int, panel: int) -> None:
    """Write a block's finished sums of one panel."""
    gated, bias, residual = arg(args, GATED), arg(args, BIAS), arg(args, RESIDUAL)
    for part in range(VECTORS):
        packed = panel * PANEL + part * LANES
        column = packed // 2 if gated else packed
        columns = max(min(arg(args, COLUMNS) - column, 8 if gated else LANES), 0)
        own_bias = bias + packed * 4 if bias else 0
        for row in range(rows):
            source = sums + row * SUM_BYTES + part * LANES * 4
            target = arg(args, OUT) + (first_row + row) * arg(args, OUT_STRIDE) + column * 4
            added = residual + (first_row + row) * arg(args, RESIDUAL_STRIDE) + column * 4 if residual else 0
            if gated:
                finish_gated(columns, source, own_bias, target, added)
            else:
                finish_plain(columns, source, own_bias, target, added)


@device
def multiply_panel(args: int, scratch: int, first_row: int, rows: int, panel: int) -> None:
    """All rows of a packed block times one panel, chunk of k by chunk."""
    bfloat16, row_bytes = arg(args, BFLOAT16_PANELS), PANEL * 4
    if bfloat16:
        row_bytes = PANEL * 2
    sums = scratch + arg(args, AT_SUMS)
    fill_bytes(sums, 0, rows * SUM_BYTES)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    step = row_bytes // tiles
    padded = (arg(args, K) + K_STEP - 1) & -K_STEP
    address = arg(args, PANELS) + panel * arg(args, PANEL_BYTES)
    a, start = scratch, 0
    while start < padded:
        count = min(padded - start, arg(args, CHUNK))
        ahead = address + (PREFETCH_BYTES if tiles == 1 else count * row_bytes)
        row = 0
        for tile in range(tiles):
            end = (tile + 1) * rows // tiles
            linear_tile(bfloat16, end - row, a + row * PITCH, address, count, sums + row * SUM_BYTES, ahead, step)
            ahead += count * step
            row = end
        a += arg(args, BLOCK_ROWS) * PITCH
        address += count * row_bytes
        start += count
    finish_panel(args, sums, first_row, rows, panel)


@device
def pack_rows(args: int, scratch: int, first_row: int, rows: int) -> None:
    """Copy a block of x as ``[chunk][BLOCK_ROWS][PITCH]``, padded with zeros to whole chunks."""
    k, chunk = arg(args, K), arg(args, CHUNK)
    target = scratch
    for start in range(0, k, chunk):
        for row in range(rows):
            source = arg(args, X) + (first_row + row) * arg(args, X_STRIDE) + start * 4
            copy_padded(source, target + row * PITCH, min(k - start, chunk), chunk)
        target += arg(args, BLOCK_ROWS) * PITCH


@device
def linear(args: int) -> None:
    """Take groups of panels until none is left, from a block of rows of one's own first: each block is packed anew."""
    worker = fetch_add(args + 8 * WORKER, 1)
    scratch = arg(args, SCRATCH) + worker * arg(args, SCRATCH_BYTES)
    blocks, groups, rows, panels = arg(args, BLOCKS), arg(args, GROUPS), arg(args, ROWS), arg(args, PANEL_COUNT)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for turn in range(blocks):
        block = (worker * blocks // arg(args, WORKERS) + turn) % blocks
        counter = arg(args, NEXT_GROUPS) + 8 * block
        first_row = (block * tiles // blocks) * rows // tiles
        block_rows = ((block + 1) * tiles // blocks) * rows // tiles - first_row
        group, packed = fetch_add(counter, 1), False
        while group < groups:
            if not packed:
                pack_rows(args, scratch, first_row, block_rows)
                packed = True
            for panel in range(group * panels // groups, (group + 1) * panels // groups):
                multiply_panel(args, scratch, first_row, block_rows, panel)
            group = fetch_add(counter, 1)
