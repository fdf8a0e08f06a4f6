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
    HEAD_BYTES,
    HEAD_DIM,
    HEAD_PARTS,
    HIGHS,
    KEYS,
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
    TOKEN_BYTES,
    TOTAL_MAXIMA,
    TOTAL_SUMS,
    VALUES,
)
from spillway.kernels.cpu.formats import FLOAT16, FLOAT32
from spillway.kernels.cpu.jit.microkernels import (
    FEW_ROWS,
    copy_row,
    merge_row,
    product,
    score_few,
    values_onto,
)
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
    even_share,
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

MANY_ROWS = FEW_ROWS  # query heads per key head from which on turning the keys once and for all pays


@device
def score_head(args: int, scratch: int, table: int, head: int, kv_head: int, token: int, end: int, ahead: int) -> None:
    """Scores of one key head's rows with a panel of sixteen tokens, [token, end)."""
    group, stride, channels = arg(args, GROUP), arg(args, PADDED_DIM) * 4, arg(args, HEAD_DIM)
    kind, token_bytes = arg(args, POOL_FORMAT), arg(args, TOKEN_BYTES)
    direct = kind <= FLOAT16 and arg(args, BLOCK_SHIFT) >= 3 and channels & 7 == 0
    panel = scratch + arg(args, AT_KEY_PANELS)
    first, second = panel, panel
    if direct:
        first = token_address(args, arg(args, KEYS), table, token, kv_head)
        second = token_address(args, arg(args, KEYS), table, token + 8, kv_head) if token + 8 < end else first
    if not direct or group > MANY_ROWS:
        load_key_panel(args, scratch, table, token, end, kv_head, panel, ahead)
    row, last_row = head * group, (head + 1) * group
    scores = scratch + arg(args, AT_SCORES) + (token & (CHUNK - 1)) * 4
    while row < last_row:
        queries = scratch + arg(args, AT_QUERIES) + row * stride
        target = scores + row * (CHUNK * 4)
        if direct and group <= MANY_ROWS:
            count = min(FEW_ROWS, last_row - row)
            case = kind * FEW_ROWS + count - 1
            score_few(case, first, second, token_bytes, channels, queries, stride, target, CHUNK * 4, ahead)
        else:
            count = even_share(last_row - row)
            product(count, queries, stride, panel, 64, channels, target, CHUNK * 4)
        row += count


@device
def score_heads(
    args: int, scratch: int, table: int, heads: int, first_head: int, token: int, end: int, after: int
) -> None:
    """Scores of up to a block's tokens [token, end), head after head; ``after`` is what will be read next."""
    head_bytes = arg(args, HEAD_BYTES)
    ahead = token_address(args, arg(args, KEYS), table, token, first_head)
    for head in range(heads):
        ahead = ahead + head_bytes if head + 1 < heads else after
        for offset in range(0, end - token, 16):
            place = ahead + offset * arg(args, TOKEN_BYTES)
            score_head(args, scratch, table, head, first_head + head, token + offset, end, place)


@device
def staged_values(args: int, scratch: int, table: int, token: int, count: int, kv_head: int) -> int:
    """Consecutive tokens' values in float32, one row of padded_dim each."""
    padded, channels = arg(args, PADDED_DIM), arg(args, HEAD_DIM)
    rows = scratch + arg(args, AT_VALUE_PANELS)
    for t in range(count):
        source = token_address(args, arg(args, VALUES), table, token + t, kv_head)
        copy_row(arg(args, POOL_FORMAT), source, channels, rows + t * padded * 4, 64, padded)
    return rows


@device
def add_head_values(
    args: int, scratch: int, table: int, heads: int, first_head: int, token: int, end: int, after: int
) -> None:
    """Continue the chunk's output chains with tokens [token, end) of one block, head after head."""
    group, padded, head_bytes = arg(args, GROUP), arg(args, PADDED_DIM), arg(args, HEAD_BYTES)
    kind, values_stride = arg(args, POOL_FORMAT), arg(args, TOKEN_BYTES)
    direct = kind <= FLOAT16 and padded == arg(args, HEAD_DIM)
    values = token_address(args, arg(args, VALUES), table, token, first_head)
    ahead = values
    for head in range(heads):
        ahead = ahead + head_bytes if head + 1 < heads else after
        if not direct:
            values = staged_values(args, scratch, table, token, end - token, first_head + head)
            kind, values_stride = FLOAT32, padded * 4
        row, last_row = head * group, (head + 1) * group
        while row < last_row:
            count = min(FEW_ROWS, last_row - row)
            case = kind * FEW_ROWS + count - 1
            weights = scratch + arg(args, AT_SCORES) + row * (CHUNK * 4) + (token & (CHUNK - 1)) * 4
            target = scratch + arg(args, AT_PRODUCT) + row * padded * 4
            values_onto(case, weights, CHUNK * 4, values, values_stride, end - token, target, padded * 4, padded, ahead)
            row += count
        values += head_bytes


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
            base = arg(args, KEYS) if end < last else arg(args, VALUES)
            after = token_address(args, base, table, chunk_start + (end if end < last else first), first_head)
            score_heads(args, scratch, table, heads, first_head, chunk_start + begin, chunk_start + end, after)
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
            base = arg(args, VALUES) if end < last else arg(args, KEYS)
            after = token_address(args, base, table, min(chunk_start + end, high - 1), first_head)
            add_head_values(args, scratch, table, heads, first_head, chunk_start + begin, chunk_start + end, after)
        begin, end = max(column, low, sinks), min(column + step, last)
        if begin < end:
            base = arg(args, VALUES) if end < last else arg(args, KEYS)
            after = token_address(args, base, table, min(chunk_start + end, high - 1), first_head)
            add_head_values(args, scratch, table, heads, first_head, chunk_start + begin, chunk_start + end, after)
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
