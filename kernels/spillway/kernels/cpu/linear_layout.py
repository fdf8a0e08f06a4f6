"""What the linear kernel is told, and the shape of its tiles: one list of names for both sides.

A weight is kept as panels ``[columns / PANEL][k][PANEL]``: a tile of the product reads one panel from end to end.
"""

import llvmlite.binding as llvm

from spillway.kernels.cpu.launch import FIRST_ARGUMENT

# Sums of one tile: TILE_ROWS x VECTORS x 16 lanes. They, one row of the panel and one splat fill the registers: 16 of 8
# lanes on AVX2, 32 of 16 lanes on AVX-512 (where NEON's 32 of 4 lanes hold the AVX2 tile).
WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
TILE_ROWS = 12 if WIDE else 6
VECTORS = 2 if WIDE else 1
PANEL = 16 * VECTORS  # columns of a panel

K_STEP = 8  # k is padded with zeros to a multiple of this
CHUNK_LIMIT = 256  # of k, part of what a result is: 16 KiB of a panel stay in the first-level cache under all rows
PITCH = (CHUNK_LIMIT + 16) * 4  # bytes between rows of a packed chunk; not a power of two, which would share cache sets
BLOCK_BYTES = 288 * 1024  # of packed rows: most of a second-level cache, so that panels are read seldom

(
    X,
    X_STRIDE,  # bytes from row to row, as all strides
    ROWS,
    K,
    CHUNK,  # k of a chunk, a multiple of K_STEP
    PANELS,  # address of the packed weight
    PANEL_COUNT,
    PANEL_BYTES,
    BFLOAT16_PANELS,  # 1 or 0
    COLUMNS,  # of the output
    OUT,
    OUT_STRIDE,
    BIAS,  # by packed column, padded; 0: none
    RESIDUAL,  # 0: none
    RESIDUAL_STRIDE,
    GATED,  # 1: lanes 0-7 of every 16 are gates of lanes 8-15
    BLOCKS,  # of rows
    BLOCK_ROWS,  # at most
    GROUPS,  # of panels
    NEXT_GROUPS,  # address of a counter per block
    WORKERS,
    AT_SUMS,  # scratch offset of a block's sums
) = range(FIRST_ARGUMENT, FIRST_ARGUMENT + 22)
ARGUMENTS = FIRST_ARGUMENT + 22

PREFETCH_BYTES = 2048  # how far ahead a panel is fetched where each number of it is used once
