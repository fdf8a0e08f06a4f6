"""Where the arguments of the element-wise kernels stand, after those that every kernel has (see launch.py)."""

ROWS, WIDTH, ROWS_A_TASK, X, X_STRIDE, SECOND, SECOND_STRIDE, OUT, OUT_STRIDE, WEIGHT, INVERSE, EPS = range(4, 16)
COS_SIN, COS_STRIDE, POSITIONS, SLOTS, KEYS, VALUES, BLOCK_STRIDE, HEAD_STRIDE = range(16, 24)
BLOCK_TOKENS, Q_HEADS, KV_HEADS, HALF, POOL_FORMAT, Q_NORM, K_NORM = range(24, 31)
COUNT = 32
