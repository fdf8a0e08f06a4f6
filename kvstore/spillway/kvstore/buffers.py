"""Views of callers' buffers as flat bytes, and page-aligned memory of our own.

Bytes move by ``numpy.copyto``: it releases the interpreter lock, which slice assignment between memoryviews does not.
"""

from __future__ import annotations

import mmap
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BlockBufferError

Bytes = npt.NDArray[np.uint8]
"""A flat array of bytes."""

Buffer = Any
"""Anything with the buffer protocol, C-contiguous: numpy arrays, memoryviews, bytearrays, mmaps."""

PAGE_BYTES = 4096
"""Alignment of everything that direct I/O touches: the largest logical sector size in use."""


def readable(buffer: Buffer, length: int) -> Bytes:
    """View ``buffer`` as its ``length`` bytes without a copy. Raises `BlockBufferError`."""
    if type(buffer) is np.ndarray and buffer.dtype == np.uint8 and buffer.ndim == 1 and buffer.flags.c_contiguous:
        view: Bytes = buffer
    else:
        try:
            view = np.frombuffer(buffer, dtype=np.uint8)
        except (ValueError, TypeError, BufferError) as error:
            raise BlockBufferError(f"a block's buffer must be C-contiguous bytes: {error}") from error
    if view.nbytes != length:
        raise BlockBufferError(f"a block of this store has {length} bytes, the buffer has {view.nbytes}")
    return view


def writable(buffer: Buffer, length: int) -> Bytes:
    """View ``buffer`` as its ``length`` writable bytes without a copy. Raises `BlockBufferError`."""
    view = readable(buffer, length)
    if not view.flags.writeable:
        raise BlockBufferError("the buffer to load a block into is read-only")
    return view


def aligned(length: int) -> Bytes:
    """``length`` zeroed bytes on a page boundary, not yet backed by memory until they are touched."""
    return np.frombuffer(mmap.mmap(-1, max(length, 1)), dtype=np.uint8)[:length]


def copy(out: Bytes, source: Bytes) -> None:
    """Copy ``source`` over ``out``, which is as long."""
    np.copyto(out, source)


def address(view: Bytes) -> int:
    """Where ``view`` lies in memory."""
    return int(view.__array_interface__["data"][0])


def is_aligned(view: Bytes) -> bool:
    """Whether direct I/O can move ``view`` as it is."""
    return address(view) % PAGE_BYTES == 0 and view.nbytes % PAGE_BYTES == 0


def round_up(value: int, unit: int = PAGE_BYTES) -> int:
    """``value`` rounded up to a multiple of ``unit``."""
    return -(-value // unit) * unit


class ThreadBuffer(threading.local):
    """One aligned buffer of ``length`` bytes per thread that asks, reused by that thread."""

    def __init__(self, length: int) -> None:
        self.bytes = aligned(length)
