"""Decode: one task is a span of one sequence, with the heads inside the walk over blocks.

A block holds the keys of all heads of a layer side by side, so taking the heads inside reads memory in long sweeps. The
steps of `tile` are kept: the same chains in the same order, stopped and continued between blocks.
"""

from spillway.kernels.cpu.attention_layout import (
    AT_KEY_PANELS,
    AT_OUTPUT,
    AT_PRODUCT,
    AT_QUERIES,
    AT_SCORES,
    AT_TOTAL,
    AT_VALUE_PANELS,
    BLOCK_SHIFT,
    CHUNK,
    CONTEXTS,
    GROUP,
    HEAD_DIM,
    HEAD_PARTS,
    HIGHS,
    KV_HEADS,
    LOWS,
    MAXIMA,
    NEW_MAXIMA,
    NEW_SUMS,
    NEW_WEIGHTS,
    OLD_WEIGHTS,
    PADDED_DIM,
    PARTIALS,
    POOL_FORMAT,
    REMAINING,
    SEQUENCES,
    SHARED,
    SINKS,
    SPAN,
    SPANS,
    SUMS_OF_ROWS,
    TABLE_STRIDE,
    TABLES,
    TOTAL_MAXIMA,
    TOTAL_SUMS,
    VALUES,
)
from spillway.kernels.cpu.formats import FLOAT32
from spillway.kernels.cpu.jit.microkernels import TILE_ROWS, copy_row, merge_row, product, product_onto
from spillway.kernels.cpu.jit.scalars import (
    copy_bytes,
    fetch_add,
    fill_bytes,
    load_float32,
    load_int,
    load_int32,
)
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import (
    arg,
    clear_state,
    close_span,
    finish_row,
    floats_of,
    ints_of,
    load_key_panel,
    load_query,
    merge_new,
    next_chunk,
    token_address,
    weigh_row,
)
from spillway.kernels.cpu.launch import SCRATCH, SCRATCH_BYTES, TICKET, WORKER


@device
def score_heads(
    args: int, scratch: int, table: int, heads: int, first_head: int, token: int, end: int, column: int
) -> None:
    """Scores of up to a block's tokens [token, end), head after head."""
    group, stride, channels = arg(args, GROUP), arg(args, PADDED_DIM) * 4, arg(args, HEAD_DIM)
    panel = scratch + arg(args, AT_KEY_PANELS)
    for head in range(heads):
        for offset in range(0, end - token, 16):
            load_key_panel(args, scratch, table, token + offset, end, first_head + head, panel)
            row, last_row = head * group, (head + 1) * group
            while row < last_row:
                count = min(TILE_ROWS, last_row - row)
                queries = scratch + arg(args, AT_QUERIES) + row * stride
                scores = scratch + arg(args, AT_SCORES) + row * (CHUNK * 4) + (column + offset) * 4
                product(count, queries, stride, panel, 64, channels, scores, CHUNK * 4)
                row += count


@device
def value_rows(args: int, scratch: int, table: int, token: int, count: int, kv_head: int) -> int:
    """Address of consecutive tokens' values in float32, one row of padded_dim each: in the pool where they are so."""
    padded, channels = arg(args, PADDED_DIM), arg(args, HEAD_DIM)
    if arg(args, POOL_FORMAT) == FLOAT32 and padded == channels:
        return token_address(args, arg(args, VALUES), table, token, kv_head)
    rows = scratch + arg(args, AT_VALUE_PANELS)
    for t in range(count):
        source = token_address(args, arg(args, VALUES), table, token + t, kv_head)
        copy_row(arg(args, POOL_FORMAT), source, channels, rows + t * padded * 4, 64, padded)
    return rows


@device
def add_head_values(
    args: int, scratch: int, table: int, heads: int, first_head: int, token: int, end: int, column: int
) -> None:
    """Continue the chunk's output chains with tokens [token, end) of one block, head after head."""
    group, stride = arg(args, GROUP), arg(args, PADDED_DIM) * 4
    for head in range(heads):
        values = value_rows(args, scratch, table, token, end - token, first_head + head)
        row, last_row = head * group, (head + 1) * group
        while row < last_row:
            count = min(TILE_ROWS, last_row - row)
            weights = scratch + arg(args, AT_SCORES) + row * (CHUNK * 4) + column * 4
            target = scratch + arg(args, AT_PRODUCT) + row * stride
            for channel in range(0, stride, 64):
                product_onto(count, weights, CHUNK * 4, values + channel, stride, end - token, target + channel, stride)
            row += count


@device
def merge_product(args: int, scratch: int, rows: int) -> None:
    """Merge the chunk's output into the running one."""
    padded = arg(args, PADDED_DIM)
    old, new = floats_of(args, scratch, OLD_WEIGHTS), floats_of(args, scratch, NEW_WEIGHTS)
    for row in range(rows):
        merge_row(
            scratch + arg(args, AT_PRODUCT) + row * padded * 4,
            scratch + arg(args, AT_OUTPUT) + row * padded * 4,
            padded,
            load_float32(old + 4 * row),
            load_float32(new + 4 * row),
        )


@device
def decode_chunk(
    args: int, scratch: int, table: int, heads: int, first_head: int, chunk_start: int, low: int, high: int
) -> None:
    """Fold one chunk into the running state of all rows; all rows see the same keys."""
    rows = heads * arg(args, GROUP)
    last = min(high - chunk_start, CHUNK)
    low = max(low - chunk_start, 0)
    sinks = min(max(arg(args, SINKS) - chunk_start, 0), last)
    step = max(1 << arg(args, BLOCK_SHIFT), 16)
    first = (0 if sinks > 0 else low) & -16
    column = first & -step
    while column < last:
        begin, end = max(column, first), min(column + step, last)
        if begin < sinks or end > low:
            score_heads(args, scratch, table, heads, first_head, chunk_start + begin, chunk_start + end, begin)
        column += step
    for row in range(rows):
        head = first_head * arg(args, GROUP) + row
        weigh_row(args, scratch, row, head, chunk_start, first, (last + 15) & -16)
    merge_new(args, scratch, MAXIMA, SUMS_OF_ROWS, NEW_MAXIMA, NEW_SUMS)
    fill_bytes(scratch + arg(args, AT_PRODUCT), 0, rows * arg(args, PADDED_DIM) * 4)
    step = 1 << arg(args, BLOCK_SHIFT)
    column = first & -step
    while column < last:
        if column < sinks:
            begin, end = column, min(column + step, sinks)
            add_head_values(args, scratch, table, heads, first_head, chunk_start + begin, chunk_start + end, begin)
        begin, end = max(max(column, low), sinks), min(column + step, last)
        if begin < end:
            add_head_values(args, scratch, table, heads, first_head, chunk_start + begin, chunk_start + end, begin)
        column += step
    merge_product(args, scratch, rows)


@device
def partial_of(args: int, sequence: int, span: int) -> int:
    """Address of a span's state."""
    q_heads, padded = arg(args, KV_HEADS) * arg(args, GROUP), arg(args, PADDED_DIM)
    floats = 2 * ((q_heads + 15) & -16) + q_heads * padded
    return arg(args, PARTIALS) + (sequence * arg(args, SPANS) + span) * floats * 4


@device
def move_state(args: int, scratch: int, partial: int, rows: int, first_row: int, to_partial: bool) -> None:
    """Copy the running state of some heads' rows between the scratch and a span's place in PARTIALS."""
    padded = arg(args, PADDED_DIM)
    all_rows = (arg(args, KV_HEADS) * arg(args, GROUP) + 15) & -16
    output, output_bytes = scratch + arg(args, AT_OUTPUT), rows * padded * 4
    maxima, sums = floats_of(args, scratch, MAXIMA), floats_of(args, scratch, SUMS_OF_ROWS)
    partial_maxima = partial + 4 * first_row
    partial_sums = partial + 4 * (all_rows + first_row)
    partial_output = partial + 8 * all_rows + first_row * padded * 4
    if to_partial:
        copy_bytes(partial_maxima, maxima, 4 * rows)
        copy_bytes(partial_sums, sums, 4 * rows)
        copy_bytes(partial_output, output, output_bytes)
    else:
        copy_bytes(maxima, partial_maxima, 4 * rows)
        copy_bytes(sums, partial_sums, 4 * rows)
        copy_bytes(output, partial_output, output_bytes)


@device
def finish_sequence(args: int, scratch: int, sequence: int, heads: int, first_head: int, spans: int) -> None:
    """Merge a sequence's spans in order, one of them straight from the scratch, and write its outputs."""
    rows, first_row = heads * arg(args, GROUP), first_head * arg(args, GROUP)
    clear_state(args, scratch, rows, TOTAL_MAXIMA, TOTAL_SUMS, AT_TOTAL)
    for span in range(spans):
        if spans > 1:
            move_state(args, scratch, partial_of(args, sequence, span), rows, first_row, False)
        close_span(args, scratch, rows)
    for row in range(rows):
        head = first_row + row
        maximum = load_float32(floats_of(args, scratch, TOTAL_MAXIMA) + 4 * row)
        total = load_float32(floats_of(args, scratch, TOTAL_SUMS) + 4 * row)
        source = scratch + arg(args, AT_TOTAL) + row * arg(args, PADDED_DIM) * 4
        finish_row(args, sequence, head, head // arg(args, GROUP), maximum, total, source)


@device
def run_span(args: int, scratch: int, sequence: int, span: int, spans: int, part: int) -> None:
    """One task: the state of a span for some heads; whoever completes the last span of them finishes the sequence."""
    parts, kv_heads, group = arg(args, HEAD_PARTS), arg(args, KV_HEADS), arg(args, GROUP)
    first_head = part * kv_heads // parts
    heads = (part + 1) * kv_heads // parts - first_head
    rows, first_row = heads * group, first_head * group
    context = load_int32(arg(args, CONTEXTS) + 4 * sequence)
    for row in range(rows):
        load_query(args, scratch, row, sequence, first_head + row // group, row % group, context - 1, context)
    low, high = load_int(ints_of(args, scratch, LOWS)), load_int(ints_of(args, scratch, HIGHS))
    clear_state(args, scratch, rows, MAXIMA, SUMS_OF_ROWS, AT_OUTPUT)
    shared = arg(args, SHARED)
    partial = partial_of(args, sequence, span)
    if shared > span * SPAN:
        move_state(args, scratch, partial, rows, first_row, False)
    table = arg(args, TABLES) + sequence * arg(args, TABLE_STRIDE)
    chunk = next_chunk(args, max(span * SPAN, shared) // CHUNK, low)
    while chunk * CHUNK < min(high, (span + 1) * SPAN):
        decode_chunk(args, scratch, table, heads, first_head, chunk * CHUNK, low, high)
        chunk = next_chunk(args, chunk + 1, low)
    if spans > 1:
        move_state(args, scratch, partial, rows, first_row, True)
        finished = fetch_add(arg(args, REMAINING) + 8 * (sequence * parts + part), 1) + 1
        if finished < spans - shared // SPAN:
            return
    finish_sequence(args, scratch, sequence, heads, first_head, spans)


@device
def spans_of(args: int, sequence: int) -> int:
    """Spans of a sequence's context, at least one."""
    return max((load_int32(arg(args, CONTEXTS) + 4 * sequence) + SPAN - 1) // SPAN, 1)


@device
def paged_decode(args: int) -> None:
    """Take spans until none is left."""
    scratch = arg(args, SCRATCH) + fetch_add(args + 8 * WORKER, 1) * arg(args, SCRATCH_BYTES)
    parts, sequences, done_spans = arg(args, HEAD_PARTS), arg(args, SEQUENCES), arg(args, SHARED) // SPAN
    sequence, passed = 0, 0
    ticket = fetch_add(args + 8 * TICKET, 1)
    while sequence < sequences:
        spans = spans_of(args, sequence)
        tasks = (spans - done_spans) * parts
        if ticket >= passed + tasks:
            passed += tasks
            sequence += 1
        else:
            task = ticket - passed
            run_span(args, scratch, sequence, done_spans + task // parts, spans, task % parts)
            ticket = fetch_add(args + 8 * TICKET, 1)
