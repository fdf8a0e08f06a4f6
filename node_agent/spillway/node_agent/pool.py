"""The device pool's memory, and how many blocks fit a budget."""

from __future__ import annotations

import mmap
from math import prod

import torch

from spillway.api.errors import SpillwayError


class PoolTooSmallError(SpillwayError):
    """The device KV budget does not hold even a handful of blocks."""


class PoolTooLargeError(SpillwayError):
    """The device has less memory than the KV budget."""


MIN_BLOCKS = 4
MAX_CUDA_ROWS = 2**31 - 1
"""Vectors of one head that a pool on CUDA holds at most: its kernels count them in 32 bits."""


def block_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one block ``[layers, 2, kv_heads, block_tokens, head_dim]``."""
    return prod(shape) * dtype.itemsize


def allocate_pool(budget_bytes: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A pool ``[num_blocks, *shape]`` of as many blocks as the budget holds.

    On the CPU the pages are huge ones where the system gives them and are backed on first use: resident memory follows
    the blocks that were ever used, which the block manager hands out from the lowest upwards.

    Raises:
        PoolTooSmallError: fewer than four blocks fit.
        PoolTooLargeError: there is not so much memory.
    """
    size = block_bytes(shape, dtype)
    num_blocks = budget_bytes // size
    if device.type != "cpu":
        num_blocks = min(num_blocks, MAX_CUDA_ROWS // prod(shape[:-1]))
    if num_blocks < MIN_BLOCKS:
        raise PoolTooSmallError(
            f"a device KV budget of {budget_bytes} bytes holds {num_blocks} blocks of {size} bytes",
            f"Give --device-kv at least {MIN_BLOCKS * size} bytes; `spillway size` prints what a context needs.",
        )
    try:
        if device.type != "cpu":
            return torch.zeros((num_blocks, *shape), dtype=dtype, device=device)
        arena = mmap.mmap(-1, num_blocks * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, torch.OutOfMemoryError) as error:
        raise PoolTooLargeError(f"no {budget_bytes} bytes of memory for device KV", "Give --device-kv less.") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(arena, dtype=dtype).view(num_blocks, *shape)
