"""Blocks within the pool and between pool and staging, on the CPU."""

import ctypes
import struct

import torch
from torch import Tensor

from spillway.kernels.cpu.block_layout import MOVE_ARGUMENTS
from spillway.kernels.cpu.checks import check_ids
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.errors import KernelDtypeError, KernelShapeError

_PACK = struct.Struct(MOVE_ARGUMENTS)
_Block = ctypes.c_int64 * len(MOVE_ARGUMENTS)
_PIECE_BYTES = 256 * 1024  # of one task; memory bandwidth is reached well below
_ALONE_BYTES = 128 * 1024  # below this a second thread costs more than it brings


def copy_blocks(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """See `spillway.kernels.copy_blocks`."""
    count = src.numel()
    _move(count, pool, pool.data_ptr(), check_ids("src", src, count), pool.data_ptr(), check_ids("dst", dst, count))


def gather_blocks(pool: Tensor, ids: Tensor, staging: Tensor) -> None:
    """See `spillway.kernels.gather_blocks`."""
    count = ids.numel()
    _check_staging(pool, staging, count)
    _move(count, pool, pool.data_ptr(), check_ids("ids", ids, count), staging.data_ptr(), 0)


def scatter_blocks(pool: Tensor, ids: Tensor, staging: Tensor) -> None:
    """See `spillway.kernels.scatter_blocks`."""
    count = ids.numel()
    _check_staging(pool, staging, count)
    _move(count, pool, staging.data_ptr(), 0, pool.data_ptr(), check_ids("ids", ids, count))


def _check_staging(pool: Tensor, staging: Tensor, count: int) -> None:
    block = pool.stride(0)
    if not staging.is_contiguous() or staging.numel() != count * block:
        raise KernelShapeError(
            f"staging must hold {count} blocks of {block} numbers in a row, got {tuple(staging.shape)}"
        )
    if staging.dtype is not pool.dtype:
        raise KernelDtypeError(f"staging must be {pool.dtype} like the pool, got {staging.dtype}")


def _move(count: int, pool: Tensor, source: int, source_ids: int, target: int, target_ids: int) -> None:
    if not pool.is_contiguous():
        raise KernelShapeError("the pool must be contiguous")
    block_bytes = pool.stride(0) * pool.element_size()
    threads = torch.get_num_threads() if count * block_bytes > _ALONE_BYTES else 1
    arguments = _Block()
    _PACK.pack_into(arguments, 0, 0, 0, 0, 0, count, block_bytes, _PIECE_BYTES, source, source_ids, target, target_ids)
    kernel("move_blocks").run(arguments, threads)
