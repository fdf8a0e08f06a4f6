"""Merging attention over two sets of keys, on the CPU."""

import ctypes
import struct

import torch
from torch import Tensor

from spillway.kernels.cpu.block_layout import MERGE_ARGUMENTS
from spillway.kernels.cpu.checks import check_rows, format_code, row_stride
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.errors import KernelShapeError

_PACK = struct.Struct(MERGE_ARGUMENTS)
_Block = ctypes.c_int64 * len(MERGE_ARGUMENTS)
_NUMBERS_A_THREAD = 16384


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `spillway.kernels.merge_states`."""
    if out_a.dim() != 3:
        raise KernelShapeError(f"out_a must be [rows, heads, head_dim], got {tuple(out_a.shape)}")
    out = torch.empty(out_a.shape, dtype=out_a.dtype) if out is None else out
    lse = torch.empty(lse_a.shape) if lse is None else lse
    shape, dtype = out_a.shape, out_a.dtype
    rows, heads, channels = shape
    row = heads * channels
    values: list[int] = []
    for side, tensor, own_lse in (("a", out_a, lse_a), ("b", out_b, lse_b), ("", out, lse)):
        stride = (
            row_stride("out_a", tensor, row) if side == "a" else check_rows(f"out_{side}", tensor, shape, dtype, row)
        )
        lse_stride = check_rows(f"lse_{side}", own_lse, shape[:2], torch.float32, heads)
        values += [tensor.data_ptr(), stride, own_lse.data_ptr(), lse_stride]
    threads = max(1, min(torch.get_num_threads(), rows * row // _NUMBERS_A_THREAD))
    arguments = _Block()
    _PACK.pack_into(arguments, 0, 0, 0, 0, 0, rows, heads, channels, format_code("out_a", dtype, 3), *values)
    kernel("merge_states").run(arguments, threads)
    return out, lse
