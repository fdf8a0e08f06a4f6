"""Files that are either the old ones or the new ones after a power cut, never a mixture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

Value = TypeVar("Value")

TEMPORARY_SUFFIX = ".spillway.tmp"
_WRITE_BUFFER_BYTES = 1024 * 1024


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well: fsync, rename, fsync of the directory.

    The temporary file has a fixed name beside `path`, so one left behind by a kill is overwritten by the next attempt;
    the caller holds a lock that keeps others away. If the block raises, `path` is untouched and the temporary removed.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb", buffering=_WRITE_BUFFER_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Deletes a file if it is there, durably."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes names created, renamed or removed in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_of(path: Path) -> Path:
    """Where the second copy of a small file is kept."""
    return path.with_name(path.name + ".copy")


def write_twice(path: Path, content: bytes) -> None:
    """Writes a small file and, after it, a copy: tearing either leaves the other to mend it from."""
    for each in (path, copy_of(path)):
        with replacing(each) as file:
            file.write(content)


def remove_twice(path: Path) -> None:
    """Deletes a file written by `write_twice`, durably; the copy first, since it would bring the file back."""
    remove(copy_of(path))
    remove(path)


def read_twice(path: Path, decode: Callable[[bytes], Value]) -> tuple[Value, bool] | None:
    """What `write_twice` wrote, and whether it had to be mended from the copy; None if neither file is there.

    `decode` raises ValueError for what was not written in one piece. If that is so of both, its error is raised.
    """
    torn: ValueError | None = None
    try:
        content = path.read_bytes()
        value = decode(content)
        if not copy_of(path).exists() or copy_of(path).read_bytes() != content:  # killed between the two, or torn
            with replacing(copy_of(path)) as file:
                file.write(content)
        return value, False  # noqa: TRY300 — what raises is above
    except FileNotFoundError:
        pass
    except ValueError as error:
        torn = error
    try:
        content = copy_of(path).read_bytes()
        value = decode(content)
    except FileNotFoundError:
        if torn is None:
            return None
        raise torn from None
    with replacing(path) as file:
        file.write(content)
    return value, True
