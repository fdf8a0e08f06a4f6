"""Arguments of the kernels that move, code and merge, after those that every kernel has (see `launch`)."""

from spillway.kernels.cpu.launch import FIRST_ARGUMENT

# move_blocks: ids are int64, 0 for 0, 1, 2 ...
BLOCKS, BLOCK_BYTES, PIECE_BYTES, SOURCE, SOURCE_IDS, TARGET, TARGET_IDS = range(FIRST_ARGUMENT, FIRST_ARGUMENT + 7)
MOVE_ARGUMENTS = "q" * (FIRST_ARGUMENT + 7)

# quantize_blocks and dequantize_blocks
(
    COUNT,  # of blocks
    LAYERS,
    KV_HEADS,
    BLOCK_TOKENS,
    CHANNELS,
    RUN,  # channels of one group of values
    VALUES,  # address of the plain blocks
    VALUES_FORMAT,
    PACKED,  # address of the coded blocks
    PACKED_STRIDE,
    CODE,  # FP8_CODE, INT8_CODE or INT4_CODE
    CODE_BITS,
    SCALES,  # offset in a coded block
    MINIMA,  # offset in a coded block
) = range(FIRST_ARGUMENT, FIRST_ARGUMENT + 14)
CODE_ARGUMENTS = "q" * (FIRST_ARGUMENT + 14)
FP8_CODE, INT8_CODE, INT4_CODE = range(3)

# merge_states: a and b and the result by rows of heads; strides in bytes
(
    ROWS,
    HEADS,
    HEAD_DIM,
    FORMAT,
    A,
    A_STRIDE,
    A_LSE,
    A_LSE_STRIDE,
    B,
    B_STRIDE,
    B_LSE,
    B_LSE_STRIDE,
    OUT,
    OUT_STRIDE,
    OUT_LSE,
    OUT_LSE_STRIDE,
) = range(FIRST_ARGUMENT, FIRST_ARGUMENT + 16)
MERGE_ARGUMENTS = "q" * (FIRST_ARGUMENT + 16)
