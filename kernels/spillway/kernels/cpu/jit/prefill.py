"""Chunked prefill: one task is a tile of rows of one sequence and one key head."""

from spillway.kernels.cpu.attention_layout import (
    AT_TOTAL,
    CONTEXTS,
    GROUP,
    HIGHS,
    KV_HEADS,
    LOWS,
    PADDED_DIM,
    PREFILL_ROWS,
    SEQUENCES,
    STARTS,
    TABLE_STRIDE,
    TABLES,
    TOTAL_MAXIMA,
    TOTAL_SUMS,
)
from spillway.kernels.cpu.jit.scalars import fetch_add, load_float32, load_int, load_int32
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import arg, attend_rows, finish_row, floats_of, ints_of, load_query
from spillway.kernels.cpu.launch import SCRATCH, SCRATCH_BYTES, TICKET, WORKER


@device
def tiles_of(args: int, sequence: int) -> int:
    """Tiles of rows of one sequence."""
    starts = arg(args, STARTS)
    tokens = load_int32(starts + 4 * sequence + 4) - load_int32(starts + 4 * sequence)
    return (tokens * arg(args, GROUP) + PREFILL_ROWS - 1) // PREFILL_ROWS


@device
def run_tile(args: int, scratch: int, sequence: int, tile: int, kv_head: int) -> None:
    """Attention of one tile, from loading its queries to writing its outputs."""
    group, padded = arg(args, GROUP), arg(args, PADDED_DIM)
    start = load_int32(arg(args, STARTS) + 4 * sequence)
    tokens = load_int32(arg(args, STARTS) + 4 * sequence + 4) - start
    context = load_int32(arg(args, CONTEXTS) + 4 * sequence)
    first_row = tile * PREFILL_ROWS
    rows = min(PREFILL_ROWS, tokens * group - first_row)
    low, high = context, 0
    for row in range(rows):
        token = (first_row + row) // group
        group_head = (first_row + row) - token * group
        load_query(args, scratch, row, start + token, kv_head, group_head, context - tokens + token, context)
        low = min(low, load_int(ints_of(args, scratch, LOWS) + 8 * row))
        high = max(high, load_int(ints_of(args, scratch, HIGHS) + 8 * row))
    table = arg(args, TABLES) + sequence * arg(args, TABLE_STRIDE)
    attend_rows(args, scratch, table, rows, first_row, kv_head, low, high)
    for row in range(rows):
        token = (first_row + row) // group
        head = kv_head * group + (first_row + row) - token * group
        maximum = load_float32(floats_of(args, scratch, TOTAL_MAXIMA) + 4 * row)
        total = load_float32(floats_of(args, scratch, TOTAL_SUMS) + 4 * row)
        source = scratch + arg(args, AT_TOTAL) + row * padded * 4
        finish_row(args, start + token, head, kv_head, maximum, total, source)


@device
def flash_prefill(args: int) -> None:
    """Take tiles until none is left: the last of a sequence first, since they see the most keys."""
    scratch = arg(args, SCRATCH) + fetch_add(args + 8 * WORKER, 1) * arg(args, SCRATCH_BYTES)
    kv_heads, sequences = arg(args, KV_HEADS), arg(args, SEQUENCES)
    sequence, passed = 0, 0
    ticket = fetch_add(args + 8 * TICKET, 1)
    while sequence < sequences:
        tiles = tiles_of(args, sequence)
        if ticket >= passed + tiles * kv_heads:
            passed += tiles * kv_heads
            sequence += 1
        else:
            task = ticket - passed
            run_tile(args, scratch, sequence, tiles - 1 - task // kv_heads, task % kv_heads)
            ticket = fetch_add(args + 8 * TICKET, 1)
