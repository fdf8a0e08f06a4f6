"""Arguments of the kernels that go row by row, after those that every kernel has (see `launch`).

They are int64, or float64 where a comment says so; strides are bytes from row to row.
"""

from spillway.kernels.cpu.launch import FIRST_ARGUMENT

ROWS, ROWS_A_TICKET, FORMAT, WIDTH, X, X_STRIDE, OUT, OUT_STRIDE = range(FIRST_ARGUMENT, FIRST_ARGUMENT + 8)
_OWN = FIRST_ARGUMENT + 8

# rms_norm
RESIDUAL, RESIDUAL_STRIDE, WEIGHT, EPS = range(_OWN, _OWN + 4)  # EPS: float64; RESIDUAL: 0 for none
NORM_ARGUMENTS = "q" * (_OWN + 3) + "d"

# silu_mul
SILU_ARGUMENTS = "q" * _OWN

# rope_write_kv and write_kv: X is q (none in write_kv), WIDTH a head's channels, OUT the layer's keys in block 0
(
    K,
    K_STRIDE,
    V,
    V_STRIDE,
    SLOTS,
    VALUES,  # bytes from a block's keys to its values
    POOL_FORMAT,
    BLOCK_BYTES,
    HEAD_BYTES,
    TOKEN_BYTES,
    BLOCK_TOKENS,
    Q_HEADS,
    KV_HEADS,
    COS_SIN,  # 0: nothing is rotated
    COS_SIN_STRIDE,
    POSITIONS,
    HALF,  # of the rotated channels
    Q_NORM,  # 0: none
    K_NORM,  # 0: none
    KV_SCALES,  # 0: none
    HEAD_EPS,  # float64
) = range(_OWN, _OWN + 21)
WRITE_ARGUMENTS = "q" * (_OWN + 20) + "d"
