"""Runs the kernels that go row by row."""

import ctypes
import struct
from functools import cache

import torch

from spillway.kernels.cpu.compile import kernel
from spillway.kernels.cpu.launch import TICKET, scratch_address

_NUMBERS_A_THREAD = 16384  # below this a second thread costs more than it brings


@cache
def _packing(arguments: str) -> tuple[struct.Struct, type["ctypes.Array[ctypes.c_int64]"]]:
    return struct.Struct(arguments), ctypes.c_int64 * len(arguments)


def run_rows(name: str, arguments: str, rows: int, row_numbers: int, *values: float, scratch_bytes: int = 0) -> None:
    """Run a kernel over ``rows`` rows of about ``row_numbers`` numbers each.

    Args:
        name: the kernel.
        arguments: struct format of all its arguments, one letter each (see `elementwise_layout`).
        rows, row_numbers: how much work there is; decides the threads.
        values: the arguments after ROWS_A_TICKET.
        scratch_bytes: of each worker.
    """
    threads = max(1, min(torch.get_num_threads(), rows * row_numbers // _NUMBERS_A_THREAD))
    ticket_rows = max(1, min(16, rows // (4 * threads)))
    scratch = scratch_address(threads * scratch_bytes) if scratch_bytes else 0
    packing, block = _packing(arguments)
    packed = block()
    packing.pack_into(packed, TICKET * 8, 0, 0, scratch, scratch_bytes, rows, ticket_rows, *values)
    kernel(name).run(packed, threads)
