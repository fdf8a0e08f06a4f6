"""Lines of an input file, one pass, in bounded memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from spillway.api.errors import InputChangedError, InputError

_UTF8_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1024 * 1024
_JSON_SPACE = b" \t\r\n"

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) now and then."""


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line that is not blank. `content` is None if it is too long; `number` counts from 1, blank lines included."""

    number: int
    offset: int
    content: bytes | None


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What shows cheaply that a file was written to."""

    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileStamp:
        """The stamp of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns)


class InputFile:
    """An open input. It stays open for the whole job: a file renamed over it does not disturb the job that runs."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if the path is missing, unreadable or not a regular file."""
        self.path = path
        try:
            if path.exists() and not path.is_file():
                raise InputError(f"the input {path} is not a regular file", "Write the requests to a file first.")
            self._file: BinaryIO = path.open("rb", buffering=_CHUNK_BYTES)
        except FileNotFoundError:
            raise InputError(f"the input {path} does not exist", "Check the path.") from None
        except OSError as error:
            raise InputError(f"the input {path} cannot be read: {error.strerror}", "Check its permissions.") from error
        self.stamp = FileStamp.of(self._file.fileno())

    def close(self) -> None:
        """Closes the file; safe to call twice."""
        self._file.close()

    def lines(self, max_bytes: int, digest: hashlib._Hash, progress: Progress | None = None) -> Iterator[RawLine]:
        """All lines that are not blank, from the start; every byte of the file goes through `digest`.

        A line of more than `max_bytes` (line ending not counted) is read past in pieces. Accepts LF and CRLF, a UTF-8
        byte order mark, and a last line without a newline. Raises InputError for a file that is plainly not JSON lines
        (UTF-16, gzip), InputChangedError if the file changes meanwhile.
        """
        self._file.seek(0)
        self._refuse_foreign_formats(self._file.read(2))
        self._file.seek(0)
        offset = number = reported = 0
        while piece := self._file.readline(max_bytes + len(_UTF8_BOM) + len(b"\r\n")):
            digest.update(piece)
            number += 1
            start, rest = offset, 0 if piece.endswith(b"\n") else self._skip_line(digest)
            offset += len(piece) + rest
            if number == 1 and piece.startswith(_UTF8_BOM):
                piece, start = piece[3:], 3
            content = piece.removesuffix(b"\n").removesuffix(b"\r")
            if rest or len(content) > max_bytes:
                yield RawLine(number, start, None)
            elif content.strip(_JSON_SPACE):
                yield RawLine(number, start, content)
            if progress is not None and offset - reported >= _CHUNK_BYTES:
                reported = offset
                progress(offset, self.stamp.size_bytes)
        self.check_unchanged()

    def digest(self, progress: Progress | None = None) -> bytes:
        """SHA-256 of the file. Raises InputChangedError if it changes meanwhile."""
        self._file.seek(0)
        digest, done = hashlib.sha256(), 0
        while piece := self._file.read(_CHUNK_BYTES):
            digest.update(piece)
            done += len(piece)
            if progress is not None:
                progress(done, self.stamp.size_bytes)
        self.check_unchanged()
        return digest.digest()

    def read_line(self, offset: int, length: int) -> bytes:
        """The bytes of one line. Raises InputChangedError if the file was written to since it was opened."""
        return self.read_lines([(offset, length)])[0]

    def read_lines(self, places: Iterable[tuple[int, int]]) -> list[bytes]:
        """The bytes of lines at (offset, length). Raises as `read_line`."""
        descriptor = self._file.fileno()
        contents = []
        for offset, length in places:
            contents.append(os.pread(descriptor, length, offset))
            if len(contents[-1]) != length:
                raise self._changed()
        self.check_unchanged()
        return contents

    def check_unchanged(self) -> None:
        """Raises InputChangedError if size or modification time are not what they were when the file was opened."""
        if FileStamp.of(self._file.fileno()) != self.stamp:
            raise self._changed()

    def _skip_line(self, digest: hashlib._Hash) -> int:
        """Reads past the rest of a line; returns its bytes."""
        size = 0
        while piece := self._file.readline(_CHUNK_BYTES):
            digest.update(piece)
            size += len(piece)
            if piece.endswith(b"\n"):
                break
        return size

    def _changed(self) -> InputChangedError:
        return InputChangedError(
            f"the input {self.path} changed while the job was running",
            "Put the former content back and run again to resume, or pass --restart to begin with the new content.",
        )

    def _refuse_foreign_formats(self, start: bytes) -> None:
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"the input {self.path} is UTF-16", "Convert it to UTF-8.")
        if start == b"\x1f\x8b":
            raise InputError(f"the input {self.path} is gzip-compressed", "Unpack it first.")
