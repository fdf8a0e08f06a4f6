"""Where each request line lies in the input, and in which order lines run: flat arrays, 16 + 4 bytes a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from spillway.api.errors import JobCorruptError
from spillway.gateway.durable import replacing

LINE_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("number", "<u4")])
_MAGIC = b"SPWTAB01"
_CHUNK_ROWS = 65536
_HEADER_DTYPE = np.dtype([("magic", "S8"), ("lines", "<u8"), ("runnable", "<u8"), ("checksum", "<u8")])


@dataclass(frozen=True, slots=True)
class LineTable:
    """`lines` `[n]` of LINE_DTYPE, by line index: byte offset, bytes without line ending, number in the file from 1.

    `order` `[m] uint32`: indices of the lines that passed validation, in the order in which they should run.
    """

    lines: npt.NDArray[np.void]
    order: npt.NDArray[np.uint32]

    def save(self, path: Path) -> None:
        """Writes the table durably."""
        header = np.zeros((), dtype=_HEADER_DTYPE)
        header["magic"], header["lines"], header["runnable"] = _MAGIC, len(self.lines), len(self.order)
        header["checksum"] = _checksum(self.lines, self.order)
        with replacing(path) as file:
            for part in (header, self.lines, self.order):
                file.write(part.tobytes())

    @classmethod
    def load(cls, path: Path) -> LineTable:
        """Maps a saved table; pages are read on use and can be dropped by the kernel. Raises JobCorruptError."""
        broken = JobCorruptError(f"{path} is missing or damaged", "Pass --restart to start the job over.")
        try:
            size = path.stat().st_size
            if size < _HEADER_DTYPE.itemsize:
                raise broken
            raw = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise broken from None
        header = raw[: _HEADER_DTYPE.itemsize].view(_HEADER_DTYPE)[0]
        lines_end = _HEADER_DTYPE.itemsize + int(header["lines"]) * LINE_DTYPE.itemsize
        if header["magic"] != _MAGIC or size != lines_end + 4 * int(header["runnable"]):
            raise broken
        table = cls(raw[_HEADER_DTYPE.itemsize : lines_end].view(LINE_DTYPE), raw[lines_end:].view("<u4"))
        if _checksum(table.lines, table.order) != int(header["checksum"]):
            raise broken
        return table


def _checksum(lines: npt.NDArray[np.void], order: npt.NDArray[np.uint32]) -> int:
    state = xxhash.xxh3_64(seed=len(lines))
    for part in (lines, order):
        for start in range(0, len(part), _CHUNK_ROWS):
            state.update(part[start : start + _CHUNK_ROWS].tobytes())
    return state.intdigest()
