"""Where each request line lies in the input, and in which order lines run: flat arrays.

16 + 4 bytes a line, and 12 for each level of families that its prompt reaches, at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from spillway.api.errors import JobCorruptError
from spillway.gateway.durable import replacing
from spillway.gateway.families import LEVELS, Families

LINE_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("number", "<u4")])
_MAGIC = b"SPWTAB02"
_CHUNK_ROWS = 65536
_HEADER_DTYPE = np.dtype(
    [("magic", "S8"), ("lines", "<u8"), ("runnable", "<u8"), ("families", "<u8", len(LEVELS)), ("checksum", "<u8")]
)


@dataclass(frozen=True, slots=True)
class LineTable:
    """`lines` `[n]` of LINE_DTYPE, by line index: byte offset, bytes without line ending, number in the file from 1.

    `order` `[m] uint32`: indices of the lines that passed validation, in the order in which they should run.
    `families`: one `[3, n] uint32` for each of families.LEVELS.
    """

    lines: npt.NDArray[np.void]
    order: npt.NDArray[np.uint32]
    families: tuple[Families, ...]

    def save(self, path: Path) -> None:
        """Writes the table durably."""
        header = np.zeros((), dtype=_HEADER_DTYPE)
        header["magic"], header["lines"], header["runnable"] = _MAGIC, len(self.lines), len(self.order)
        header["families"] = [level.shape[1] for level in self.families]
        header["checksum"] = _checksum(self.lines, self.order, *self.families)
        with replacing(path) as file:
            for part in (header, self.lines, self.order, *self.families):
                file.write(part.tobytes())

    @classmethod
    def load(cls, path: Path) -> LineTable:
        """Maps a saved table; pages are read on use and can be dropped by the kernel. Raises JobCorruptError."""
        broken = JobCorruptError(f"{path} is missing or damaged", "Pass --restart to start the job over.")
        try:
            size = path.stat().st_size
            if size < _HEADER_DTYPE.itemsize:
                raise broken
            raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # plain: views of a memmap are slow to make
        except FileNotFoundError:
            raise broken from None
        header = raw[: _HEADER_DTYPE.itemsize].view(_HEADER_DTYPE)[0]
        counts = [int(count) for count in header["families"]]
        sizes = [int(header["lines"]) * LINE_DTYPE.itemsize, 4 * int(header["runnable"]), *(12 * n for n in counts)]
        stops = [_HEADER_DTYPE.itemsize, *(_HEADER_DTYPE.itemsize + stop for stop in accumulate(sizes))]
        if header["magic"] != _MAGIC or size != stops[-1]:
            raise broken
        lines, order, *levels = (raw[start:stop] for start, stop in pairwise(stops))
        found = tuple(level.view("<u4").reshape(3, -1) for level in levels)
        table = cls(lines.view(LINE_DTYPE), order.view("<u4"), found)
        if _checksum(table.lines, table.order, *table.families) != int(header["checksum"]):
            raise broken
        return table


def _checksum(lines: npt.NDArray[np.void], *parts: npt.NDArray[np.uint32]) -> int:
    state = xxhash.xxh3_64(seed=len(lines))
    for part in (lines, *(part.reshape(-1) for part in parts)):
        for start in range(0, len(part), _CHUNK_ROWS):
            state.update(part[start : start + _CHUNK_ROWS].tobytes())
    return state.intdigest()
