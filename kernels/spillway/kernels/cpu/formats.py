"""Codes by which the compiled kernels know number formats."""

import torch

FLOAT32, BFLOAT16, FLOAT16, FP8, INT8 = range(5)
ITEM_BYTES = (4, 2, 2, 1, 1)

FORMAT_OF = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float8_e4m3fn: FP8,
    torch.int8: INT8,
}
