"""Whole reads and writes at an offset, past the page cache where the file system allows it.

`os.preadv` and `os.pwritev` release the interpreter lock and move aligned memory without a copy, so a few threads
keep a disk busy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ...buffers import PAGE_BYTES, Bytes, aligned


class ShortTransferError(OSError):
    """Fewer bytes were moved than asked for, without an error from the system."""


def supports_direct_io(directory: Path) -> bool:
    """Whether files in ``directory`` can be written and read past the page cache: tried there, not guessed."""
    path = directory / f".probe-{os.getpid()}"
    page = aligned(PAGE_BYTES)
    page[:] = 0x5A
    back = aligned(PAGE_BYTES)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except (OSError, AttributeError):
        return False
    finally:
        path.unlink(missing_ok=True)
    try:
        write_all(descriptor, [page], 0)
        read_all(descriptor, [back], 0)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return bool((back == page).all())


def open_file(path: Path, *, direct: bool, create: bool = False, write: bool = True) -> int:
    """Open for reading and, if ``write``, writing. Raises OSError."""
    flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_CREAT | os.O_EXCL if create else 0)
    return os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600)


def write_all(descriptor: int, parts: Sequence[Bytes], offset: int) -> None:
    """Write ``parts`` one after the other at ``offset`` in one call. Raises OSError, `ShortTransferError` included."""
    wanted = sum(part.nbytes for part in parts)
    moved = os.pwritev(descriptor, [part.data for part in parts], offset)
    if moved != wanted:
        raise ShortTransferError(f"wrote {moved} of {wanted} bytes")


def read_all(descriptor: int, parts: Sequence[Bytes], offset: int) -> None:
    """Fill ``parts`` from ``offset`` in one call. Raises OSError, `ShortTransferError` included."""
    wanted = sum(part.nbytes for part in parts)
    moved = os.preadv(descriptor, [part.data for part in parts], offset)
    if moved != wanted:
        raise ShortTransferError(f"read {moved} of {wanted} bytes")
