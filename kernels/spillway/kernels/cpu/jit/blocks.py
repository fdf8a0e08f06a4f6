"""Whole blocks from place to place."""

from spillway.kernels.cpu.block_layout import (
    BLOCK_BYTES,
    BLOCKS,
    PIECE_BYTES,
    SOURCE,
    SOURCE_IDS,
    TARGET,
    TARGET_IDS,
)
from spillway.kernels.cpu.jit.scalars import copy_bytes, fetch_add, load_int
from spillway.kernels.cpu.jit.subset import device
from spillway.kernels.cpu.jit.tile import arg
from spillway.kernels.cpu.launch import TICKET


@device
def move_blocks(args: int) -> None:
    """Take pieces until none is left."""
    block_bytes, piece_bytes = arg(args, BLOCK_BYTES), arg(args, PIECE_BYTES)
    sources, targets = arg(args, SOURCE_IDS), arg(args, TARGET_IDS)
    pieces = (block_bytes + piece_bytes - 1) // piece_bytes
    ticket = fetch_add(args + 8 * TICKET, 1)
    while ticket < arg(args, BLOCKS) * pieces:
        block, start = ticket // pieces, ticket % pieces * piece_bytes
        source = load_int(sources + 8 * block) if sources != 0 else block
        target = load_int(targets + 8 * block) if targets != 0 else block
        copy_bytes(
            arg(args, TARGET) + target * block_bytes + start,
            arg(args, SOURCE) + source * block_bytes + start,
            min(piece_bytes, block_bytes - start),
        )
        ticket = fetch_add(args + 8 * TICKET, 1)
