"""The shared part of a cascade: one task is a span of the prefix for one key head and a tile of all sequences' rows."""

from spillway.kernels.cpu.attention_layout import (
    AT_OUTPUT,
    CHUNK,
    CONTEXTS,
    GROUP,
    KV_HEADS,
    LOWS,
    MAXIMA,
    PADDED_DIM,
    PREFILL_ROWS,
    SEQUENCES,
    SHARED,
    SPAN,
    SUMS_OF_ROWS,
    TABLES,
)
from spillway.kernels.cpu.jit.decode import partial_of
from spillway.kernels.cpu.jit.scalars import copy_bytes, fetch_add, load_float32, load_int, load_int32, store_float32
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import (
    arg,
    attend_chunk,
    clear_state,
    floats_of,
    ints_of,
    load_query,
    next_chunk,
)
from spillway.kernels.cpu.launch import SCRATCH, SCRATCH_BYTES, TICKET, WORKER


@device
def save_rows(args: int, scratch: int, rows: int, first_row: int, kv_head: int, span: int) -> None:
    """Put each row's state where its sequence's decode looks for the span."""
    group, padded = arg(args, GROUP), arg(args, PADDED_DIM)
    all_rows = (arg(args, KV_HEADS) * group + 15) & -16
    for row in range(rows):
        sequence = (first_row + row) // group
        head = kv_head * group + (first_row + row) - sequence * group
        partial = partial_of(args, sequence, span)
        store_float32(partial + 4 * head, load_float32(floats_of(args, scratch, MAXIMA) + 4 * row))
        sums = load_float32(floats_of(args, scratch, SUMS_OF_ROWS) + 4 * row)
        store_float32(partial + 4 * (all_rows + head), sums)
        output = scratch + arg(args, AT_OUTPUT) + row * padded * 4
        copy_bytes(partial + 8 * all_rows + head * padded * 4, output, padded * 4)


@device
def run_shared_span(args: int, scratch: int, span: int, tile: int, kv_head: int) -> None:
    """The state of one span of the prefix for a tile of rows."""
    group = arg(args, GROUP)
    first_row = tile * PREFILL_ROWS
    rows = min(PREFILL_ROWS, arg(args, SEQUENCES) * group - first_row)
    high = min((span + 1) * SPAN, arg(args, SHARED))
    low = high
    for row in range(rows):
        sequence = (first_row + row) // group
        context = load_int32(arg(args, CONTEXTS) + 4 * sequence)
        group_head = (first_row + row) - sequence * group
        load_query(args, scratch, row, sequence, kv_head, group_head, context - 1, context)
        low = min(low, load_int(ints_of(args, scratch, LOWS) + 8 * row))
    clear_state(args, scratch, rows, MAXIMA, SUMS_OF_ROWS, AT_OUTPUT)
    chunk = next_chunk(args, span * SPAN // CHUNK, low)
    while chunk * CHUNK < high:
        attend_chunk(args, scratch, arg(args, TABLES), rows, first_row, kv_head, chunk * CHUNK, low, high)
        chunk = next_chunk(args, chunk + 1, low)
    save_rows(args, scratch, rows, first_row, kv_head, span)


@device
def cascade_shared(args: int) -> None:
    """Take tasks until none is left."""
    scratch = arg(args, SCRATCH) + fetch_add(args + 8 * WORKER, 1) * arg(args, SCRATCH_BYTES)
    kv_heads = arg(args, KV_HEADS)
    tiles = (arg(args, SEQUENCES) * arg(args, GROUP) + PREFILL_ROWS - 1) // PREFILL_ROWS
    spans = (arg(args, SHARED) + SPAN - 1) // SPAN
    ticket = fetch_add(args + 8 * TICKET, 1)
    while ticket < tiles * kv_heads * spans:
        tile, rest = ticket % tiles, ticket // tiles
        run_shared_span(args, scratch, rest // kv_heads, tile, rest % kv_heads)
        ticket = fetch_add(args + 8 * TICKET, 1)
