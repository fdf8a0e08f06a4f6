"""Sums of attention per cached token: one task is a chunk of one sequence's keys for one key head."""

from spillway.kernels.cpu.attention_layout import (
    AT_OUTPUT,
    CHUNK,
    CONTEXTS,
    GROUP,
    HIGHS,
    KV_HEADS,
    LOWS,
    LSE,
    LSE_STRIDE,
    PREFILL_ROWS,
    SEQUENCES,
    SINKS,
    STARTS,
    SUMS,
    SUMS_SEQUENCE_STRIDE,
    SUMS_STRIDE,
    TABLE_STRIDE,
    TABLES,
)
from spillway.kernels.cpu.jit.emit import F32, LANES, microkernel
from spillway.kernels.cpu.jit.scalars import fetch_add, fill_bytes, load_float32, load_int, load_int32
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import LOG2_E, NO_KEYS, arg, ints_of, load_query, prepare_row, score_panels
from spillway.kernels.cpu.launch import SCRATCH, SCRATCH_BYTES, TICKET, WORKER


@microkernel("viiifi")
def add_weights(e, scores, first, last, shift, sums):
    """sums[c] += 2^(scores[c] - shift) for columns [first, last), multiples of 16."""
    shifts = e.splat(shift)
    with e.loop(first, last, LANES) as column:
        place = e.at(sums, column, 4)
        weight = e.exp2(e.b.fsub(e.load(e.at(scores, column, 4)), shifts))
        e.store(e.b.fadd(e.load(place), weight), place)


@microkernel("viii")
def add_floats(e, source, count, target):
    """target += source."""
    for lanes, start, stop in e.split(count):
        with e.loop(start, stop, lanes) as i:
            place = e.at(target, i, 4)
            e.store(e.b.fadd(e.load(place, F32, lanes), e.load(e.at(source, i, 4), F32, lanes)), place)


@device
def add_tile(args: int, scratch: int, sequence: int, first_row: int, rows: int, kv_head: int, chunk_start: int) -> None:
    """What one tile of rows adds to the sums in the scratch."""
    group = arg(args, GROUP)
    start = load_int32(arg(args, STARTS) + 4 * sequence)
    tokens = load_int32(arg(args, STARTS) + 4 * sequence + 4) - start
    context = load_int32(arg(args, CONTEXTS) + 4 * sequence)
    low, high = context, 0
    for row in range(rows):
        token = (first_row + row) // group
        group_head = (first_row + row) - token * group
        load_query(args, scratch, row, start + token, kv_head, group_head, context - tokens + token, context)
        low = min(low, load_int(ints_of(args, scratch, LOWS) + 8 * row))
        high = max(high, load_int(ints_of(args, scratch, HIGHS) + 8 * row))
    last = min(high - chunk_start, CHUNK)
    low = max(low - chunk_start, 0)
    sinks = min(max(arg(args, SINKS) - chunk_start, 0), last)
    if low >= last:
        low, last = sinks, sinks
    if last <= 0:
        return
    first, last_column = (0 if sinks > 0 else low) & -16, (last + 15) & -16
    table = arg(args, TABLES) + sequence * arg(args, TABLE_STRIDE)
    score_panels(args, scratch, table, rows, kv_head, chunk_start, first, sinks, low, last)
    for row in range(rows):
        token = (first_row + row) // group
        head = kv_head * group + (first_row + row) - token * group
        lse = load_float32(arg(args, LSE) + (start + token) * arg(args, LSE_STRIDE) + 4 * head)
        if lse > NO_KEYS:
            scores = prepare_row(args, scratch, row, head, chunk_start, first, last_column)
            add_weights(scores, first, last_column, lse * LOG2_E, scratch + arg(args, AT_OUTPUT))


@device
def sum_chunk(args: int, scratch: int, sequence: int, kv_head: int, chunk_start: int) -> None:
    """Add what all rows pay to one chunk of keys."""
    sums = scratch + arg(args, AT_OUTPUT)
    fill_bytes(sums, 0, CHUNK * 4)
    starts = arg(args, STARTS) + 4 * sequence
    all_rows = (load_int32(starts + 4) - load_int32(starts)) * arg(args, GROUP)
    for first_row in range(0, all_rows, PREFILL_ROWS):
        add_tile(args, scratch, sequence, first_row, min(PREFILL_ROWS, all_rows - first_row), kv_head, chunk_start)
    target = arg(args, SUMS) + sequence * arg(args, SUMS_SEQUENCE_STRIDE) + kv_head * arg(args, SUMS_STRIDE)
    context = load_int32(arg(args, CONTEXTS) + 4 * sequence)
    add_floats(sums, min(context - chunk_start, CHUNK), target + chunk_start * 4)


@device
def score_sums(args: int) -> None:
    """Take chunks of keys until none is left."""
    scratch = arg(args, SCRATCH) + fetch_add(args + 8 * WORKER, 1) * arg(args, SCRATCH_BYTES)
    kv_heads, sequences = arg(args, KV_HEADS), arg(args, SEQUENCES)
    sequence, passed = 0, 0
    ticket = fetch_add(args + 8 * TICKET, 1)
    while sequence < sequences:
        chunks = (load_int32(arg(args, CONTEXTS) + 4 * sequence) + CHUNK - 1) // CHUNK
        if ticket >= passed + chunks * kv_heads:
            passed += chunks * kv_heads
            sequence += 1
        else:
            task = ticket - passed
            sum_chunk(args, scratch, sequence, task % kv_heads, task // kv_heads * CHUNK)
            ticket = fetch_add(args + 8 * TICKET, 1)
