"""Attention of a tile of query rows over one chunk of keys, and the running softmax state between chunks.

The value of a row is defined by these steps alone, and both prefill and decode follow them:

1. The query is scaled in float32. A score is one chain of fused multiply-adds over the channels.
2. A chunk of 128 tokens, aligned to the start of the context, has its own maximum; its weights are 2^(score - maximum).
   They are summed in 16 lanes by token number, the lanes then in halves; its output is one chain over the tokens.
3. A span is four chunks merged in order, the context is its spans merged in order (FlashAttention's online softmax).

Hidden tokens weigh exactly 0 and a merge with an empty chunk changes nothing, so leaving them out leaves every bit as
it is.
"""

from spillway.kernels.cpu.attention_layout import (
    AT_KEY_PANELS,
    AT_OUTPUT,
    AT_QUERIES,
    AT_SCORES,
    AT_STAGE,
    AT_TOTAL,
    AT_VALUE_PANELS,
    BLOCK_BYTES,
    BLOCK_SHIFT,
    CAUSAL,
    CHUNK,
    FACTOR,
    GROUP,
    HEAD_BYTES,
    HEAD_DIM,
    HIGHS,
    KEYS,
    KV_HEADS,
    KV_SCALES,
    LOWS,
    LSE,
    LSE_STRIDE,
    MAXIMA,
    NEW_MAXIMA,
    NEW_SUMS,
    NEW_WEIGHTS,
    OLD_WEIGHTS,
    OUT,
    OUT_STRIDE,
    PADDED_DIM,
    POOL_FORMAT,
    POSITIONS,
    Q_FORMAT,
    Q_STRIDE,
    ROWS,
    SINKS,
    SLOPES,
    SOFT_CAP,
    SPAN_CHUNKS,
    SUMS_OF_ROWS,
    TOKEN_BYTES,
    TOTAL_MAXIMA,
    TOTAL_SUMS,
    VALUES,
    WINDOW,
    Q,
)
from spillway.kernels.cpu.formats import FLOAT32
from spillway.kernels.cpu.jit.microkernels import (
    NEGATIVE,
    TILE_ROWS,
    copy_row,
    exp2_row,
    load_row,
    merge_row,
    merge_weights,
    prepare_scores,
    product,
    product_merged,
    row_max,
    store_row,
    transpose_panel,
)
from spillway.kernels.cpu.jit.scalars import (
    fill16,
    fill_bytes,
    load_double,
    load_float32,
    load_int,
    load_int32,
    log_sum,
    store_float32,
    store_int,
)
from spillway.kernels.cpu.jit.subset import device

LOG2_E = 1.4426950408889634
NO_KEYS = float("-inf")


@device
def arg(args: int, name: int) -> int:
    """An integer argument."""
    return load_int(args + 8 * name)


@device
def item_bytes(number_format: int) -> int:
    """Bytes of one number."""
    return 4 if number_format == 0 else (2 if number_format <= 2 else 1)


@device
def floats_of(args: int, scratch: int, name: int) -> int:
    """Address of a per-row float32 array in the scratch."""
    return scratch + arg(args, ROWS) * 4 * name


@device
def ints_of(args: int, scratch: int, name: int) -> int:
    """Address of a per-row int64 array in the scratch."""
    return scratch + arg(args, ROWS) * (32 + 8 * name)


@device
def key_scale(args: int, kv_head: int) -> float:
    """What a stored key is multiplied by."""
    scales = arg(args, KV_SCALES)
    return 1.0 if scales == 0 else load_float32(scales + 4 * kv_head)


@device
def value_scale(args: int, kv_head: int) -> float:
    """What a stored value is multiplied by."""
    scales = arg(args, KV_SCALES)
    return 1.0 if scales == 0 else load_float32(scales + 4 * (arg(args, KV_HEADS) + kv_head))


@device
def slope_of(args: int, head: int) -> float:
    """ALiBi slope of a query head, in units of log2."""
    slopes = arg(args, SLOPES)
    return 0.0 if slopes == 0 else load_float32(slopes + 4 * head) * LOG2_E


@device
def load_query(
    args: int, scratch: int, row: int, token: int, kv_head: int, group_head: int, position: int, context: int
) -> None:
    """Scale one query into the scratch and note which keys it sees."""
    number_format = arg(args, Q_FORMAT)
    channels = arg(args, HEAD_DIM)
    head = kv_head * arg(args, GROUP) + group_head
    source = arg(args, Q) + token * arg(args, Q_STRIDE) + head * channels * item_bytes(number_format)
    factor = load_double(args + 8 * FACTOR) * key_scale(args, kv_head)
    target = scratch + arg(args, AT_QUERIES) + row * arg(args, PADDED_DIM) * 4
    load_row(number_format, source, channels, factor, target)
    window = arg(args, WINDOW)
    high = min(position + 1, context) if arg(args, CAUSAL) else context
    low = max(position + 1 - window, 0) if window > 0 else 0
    store_int(ints_of(args, scratch, LOWS) + 8 * row, low)
    store_int(ints_of(args, scratch, HIGHS) + 8 * row, high)
    store_int(ints_of(args, scratch, POSITIONS) + 8 * row, position)


@device
def token_address(args: int, base: int, table: int, token: int, kv_head: int) -> int:
    """Address of a token's key or value of one head, through the block table."""
    shift = arg(args, BLOCK_SHIFT)
    block = load_int32(table + 4 * (token >> shift))
    offset = token & ((1 << shift) - 1)
    return base + block * arg(args, BLOCK_BYTES) + kv_head * arg(args, HEAD_BYTES) + offset * arg(args, TOKEN_BYTES)


@device
def load_key_panel(
    args: int, scratch: int, table: int, token: int, end: int, kv_head: int, panel: int, ahead: int
) -> None:
    """Sixteen tokens' keys, from ``token``, as one panel; those at or past ``end`` are not read or are never used."""
    keys, stride = arg(args, KEYS), arg(args, TOKEN_BYTES)
    number_format, channels = arg(args, POOL_FORMAT), arg(args, HEAD_DIM)
    if arg(args, BLOCK_SHIFT) >= 3 and channels & 7 == 0:
        first = token_address(args, keys, table, token, kv_head)
        second = first
        if token + 8 < end:
            second = token_address(args, keys, table, token + 8, kv_head)
        transpose_panel(number_format, first, second, stride, channels, panel, ahead)
        return
    padded = arg(args, PADDED_DIM)
    stage = scratch + arg(args, AT_STAGE)
    for t in range(min(16, end - token)):
        source = token_address(args, keys, table, token + t, kv_head)
        copy_row(number_format, source, channels, stage + t * padded * 4, 64, padded)
    transpose_panel(FLOAT32, stage, stage + 32 * padded, padded * 4, (channels + 7) & -8, panel, stage)


@device
def load_values(
    args: int, scratch: int, table: int, chunk_start: int, first: int, sinks: int, low: int, last: int, kv_head: int
) -> None:
    """Values of a chunk's columns [first, last) as panels; columns in [sinks, low) are hidden from all rows: zeros."""
    values, number_format = arg(args, VALUES), arg(args, POOL_FORMAT)
    channels, padded = arg(args, HEAD_DIM), arg(args, PADDED_DIM)
    panels = scratch + arg(args, AT_VALUE_PANELS)
    for column in range(first, last):
        target = panels + column * 64
        if column < sinks or column >= low:
            source = token_address(args, values, table, chunk_start + column, kv_head)
            copy_row(number_format, source, channels, target, CHUNK * 64, padded)
        else:
            for group in range(padded >> 4):
                fill16(target + group * CHUNK * 64, 0.0)


@device
def even_share(rows: int) -> int:
    """How many rows to take next so that none of the last tiles is nearly empty."""
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    return (rows + tiles - 1) // tiles


@device
def score_panels(
    args: int,
    scratch: int,
    table: int,
    rows: int,
    kv_head: int,
    chunk_start: int,
    first: int,
    sinks: int,
    low: int,
    last: int,
) -> None:
    """Scores of all rows with a chunk's columns [first, last), a panel of keys at a time."""
    stride = arg(args, PADDED_DIM) * 4
    queries, scores = scratch + arg(args, AT_QUERIES), scratch + arg(args, AT_SCORES)
    highs = ints_of(args, scratch, HIGHS)
    channels = arg(args, HEAD_DIM)
    panel = scratch + arg(args, AT_KEY_PANELS)
    for column in range(first, last, 16):
        if column >= sinks and column + 16 <= low:
            continue  # hidden from all rows
        following = chunk_start + min(column + 16, last - 1)
        ahead = token_address(args, arg(args, KEYS), table, following, kv_head)
        load_key_panel(args, scratch, table, chunk_start + column, chunk_start + last, kv_head, panel, ahead)
        row = 0
        while row < rows and load_int(highs + 8 * row) <= chunk_start + column:
            row += 1  # rows that stand before this panel
        while row < rows:
            count = even_share(rows - row)
            target = scores + row * (CHUNK * 4) + column * 4
            product(count, queries + row * stride, stride, panel, 64, channels, target, CHUNK * 4)
            row += count


@device
def prepare_row(args: int, scratch: int, row: int, head: int, chunk_start: int, first: int, last: int) -> int:
    """Cap, bias and hide a row's scores of columns [first, last) where there is need; returns their address."""
    low = load_int(ints_of(args, scratch, LOWS) + 8 * row) - chunk_start
    high = load_int(ints_of(args, scratch, HIGHS) + 8 * row) - chunk_start
    position = load_int(ints_of(args, scratch, POSITIONS) + 8 * row)
    sinks = min(arg(args, SINKS) - chunk_start, high)
    scores = scratch + arg(args, AT_SCORES) + row * (CHUNK * 4)
    soft_cap = load_double(args + 8 * SOFT_CAP)
    slope = slope_of(args, head)
    if low > first or high < last or soft_cap > 0.0 or slope != 0.0:
        prepare_scores(scores, first, last, low, high, sinks, soft_cap, slope, position - chunk_start)
    return scores


@device
def weigh_row(args: int, scratch: int, row: int, head: int, chunk_start: int, first: int, last: int) -> None:
    """Turn a row's scores of columns [first, last) into weights; notes their maximum and sum."""
    scores = prepare_row(args, scratch, row, head, chunk_start, first, last)
    maximum = row_max(scores, first, last)
    store_float32(floats_of(args, scratch, NEW_MAXIMA) + 4 * row, maximum)
    store_float32(floats_of(args, scratch, NEW_SUMS) + 4 * row, exp2_row(scores, first, last, maximum))


@device
def block_end(args: int, scratch: int, row: int, count: int, chunk_start: int, last: int) -> int:
    """One past the last column of a chunk that any of these rows sees."""
    end = 0
    for r in range(row, row + count):
        end = max(end, load_int(ints_of(args, scratch, HIGHS) + 8 * r) - chunk_start)
    return min(end, last)


@device
def merge_new(args: int, scratch: int, maxima: int, sums: int, new_maxima: int, new_sums: int) -> None:
    """Fold one set of states into another; leaves the weights of both sides."""
    merge_weights(
        arg(args, ROWS),
        floats_of(args, scratch, maxima),
        floats_of(args, scratch, sums),
        floats_of(args, scratch, new_maxima),
        floats_of(args, scratch, new_sums),
        floats_of(args, scratch, OLD_WEIGHTS),
        floats_of(args, scratch, NEW_WEIGHTS),
    )


@device
def add_values(args: int, scratch: int, rows: int, chunk_start: int, first: int, last: int) -> None:
    """Merge the chunk's output into the running one."""
    stride = arg(args, PADDED_DIM) * 4
    scores, output = scratch + arg(args, AT_SCORES), scratch + arg(args, AT_OUTPUT)
    old, new = floats_of(args, scratch, OLD_WEIGHTS), floats_of(args, scratch, NEW_WEIGHTS)
    for group in range(arg(args, PADDED_DIM) >> 4):
        panel = scratch + arg(args, AT_VALUE_PANELS) + group * (CHUNK * 64) + first * 64
        row = 0
        while row < rows:
            count = min(TILE_ROWS, rows - row)
            k = block_end(args, scratch, row, count, chunk_start, last) - first
            if k > 0:
                weights = scores + row * (CHUNK * 4) + first * 4
                target = output + row * stride + group * 64
                product_merged(count, weights, CHUNK * 4, panel, 64, k, target, stride, old + 4 * row, new + 4 * row)
            row += count


@device
def attend_chunk(
    args: int, scratch: int, table: int, rows: int, first_row: int, kv_head: int, chunk_start: int, low: int, high: int
) -> None:
    """Fold one chunk into the running state; low and high bound what any row sees beside the sinks."""
    last = min(high - chunk_start, CHUNK)
    low = max(low - chunk_start, 0)
    sinks = min(max(arg(args, SINKS) - chunk_start, 0), last)
    if low >= last:
        low, last = sinks, sinks
    first = 0 if sinks > 0 else low
    first_column, last_column = first & -16, (last + 15) & -16
    score_panels(args, scratch, table, rows, kv_head, chunk_start, first_column, sinks, low, last)
    load_values(args, scratch, table, chunk_start, first, sinks, low, last, kv_head)
    group = arg(args, GROUP)
    row = 0
    while row < rows:
        count = min(TILE_ROWS, rows - row)
        end = max((block_end(args, scratch, row, count, chunk_start, last) + 15) & -16, first_column)
        for r in range(row, row + count):
            head = kv_head * group + (first_row + r) % group
            weigh_row(args, scratch, r, head, chunk_start, first_column, min(end, last_column))
        row += count
    merge_new(args, scratch, MAXIMA, SUMS_OF_ROWS, NEW_MAXIMA, NEW_SUMS)
    add_values(args, scratch, rows, chunk_start, first, last)


@device
def clear_state(args: int, scratch: int, rows: int, maxima: int, sums: int, at_output: int) -> None:
    """An empty running state."""
    for i in range(0, arg(args, ROWS), 16):
        fill16(floats_of(args, scratch, maxima) + 4 * i, NEGATIVE)
        fill16(floats_of(args, scratch, sums) + 4 * i, 0.0)
    fill_bytes(scratch + arg(args, at_output), 0, rows * arg(args, PADDED_DIM) * 4)


@device
def close_span(args: int, scratch: int, rows: int) -> None:
    """Fold the span's state into the total."""
    merge_new(args, scratch, TOTAL_MAXIMA, TOTAL_SUMS, MAXIMA, SUMS_OF_ROWS)
    padded = arg(args, PADDED_DIM)
    old, new = floats_of(args, scratch, OLD_WEIGHTS), floats_of(args, scratch, NEW_WEIGHTS)
    for row in range(rows):
        merge_row(
            scratch + arg(args, AT_OUTPUT) + row * padded * 4,
            scratch + arg(args, AT_TOTAL) + row * padded * 4,
            padded,
            load_float32(old + 4 * row),
            load_float32(new + 4 * row),
        )


@device
def next_chunk(args: int, chunk: int, low: int) -> int:
    """The first chunk from ``chunk`` on that holds sinks or reaches past ``low``."""
    if chunk * CHUNK >= arg(args, SINKS):
        return max(chunk, low // CHUNK)
    return chunk


@device
def attend_rows(
    args: int, scratch: int, table: int, rows: int, first_row: int, kv_head: int, low: int, high: int
) -> None:
    """All chunks that any row sees, spans merged in order into the total."""
    clear_state(args, scratch, rows, TOTAL_MAXIMA, TOTAL_SUMS, AT_TOTAL)
    chunk = next_chunk(args, 0, low)
    while chunk * CHUNK < high:
        span = chunk // SPAN_CHUNKS
        clear_state(args, scratch, rows, MAXIMA, SUMS_OF_ROWS, AT_OUTPUT)
        while chunk * CHUNK < high and chunk // SPAN_CHUNKS == span:
            attend_chunk(args, scratch, table, rows, first_row, kv_head, chunk * CHUNK, low, high)
            chunk = next_chunk(args, chunk + 1, low)
        close_span(args, scratch, rows)


@device
def finish_row(args: int, token: int, head: int, kv_head: int, maximum: float, total: float, source: int) -> None:
    """Divide by the sum of weights and round into the output; write the log-sum-exp."""
    number_format, channels = arg(args, Q_FORMAT), arg(args, HEAD_DIM)
    target = arg(args, OUT) + token * arg(args, OUT_STRIDE) + head * channels * item_bytes(number_format)
    factor = value_scale(args, kv_head) / total if total > 0.0 else 0.0
    store_row(number_format, source, channels, factor, target)
    if arg(args, LSE) != 0:
        lse = log_sum(maximum, total) if total > 0.0 else NO_KEYS
        store_float32(arg(args, LSE) + token * arg(args, LSE_STRIDE) + 4 * head, lse)
