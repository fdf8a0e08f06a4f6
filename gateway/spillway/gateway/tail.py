"""Results in the order in which lines finished, read from the log while it grows, from any point on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from spillway.api.results import batch_request_id, error_line
from spillway.gateway.intake import decode_error
from spillway.gateway.records import FILE_HEADER_BYTES, Record, RecordKind, scan, whole_records


@dataclass(frozen=True, slots=True)
class ResultPage:
    """Rows one behind the other, each of the output file or of the error file, with one newline each: its last byte.

    `indices`: by row, which line of the job it is. `errors`: places of the rows of the error file, ascending.
    `position`: where the log goes on.
    """

    rows: bytes
    indices: list[int]
    errors: list[int]
    position: int


@dataclass(frozen=True, slots=True)
class ResultTail:
    """The log of one job, for readers. It needs no lock: records never change once they are written."""

    log: Path
    log_key: int
    job_digest: bytes

    def read(self, start: int, end: int, max_bytes: int) -> ResultPage:
        """Rows of the records that lie in [start, end) of the log: as many as `max_bytes` of it hold, but at least one.

        `start` is 0 or where an earlier page ended; `end` is where whole records end that will not be lost
        (Ledger.durable_bytes while the job runs). Damaged stretches are passed over: their lines come later. Rows are
        copied as they stand, in one piece; each is verified.
        """
        position = max(start, FILE_HEADER_BYTES)
        if position >= end:
            return ResultPage(b"", [], [], start)
        with self.log.open("rb") as file:
            while position < end:
                piece = os.pread(file.fileno(), min(end - position, max_bytes), position)
                run = whole_records(piece, self.log_key)
                if run.indices:
                    return self._page(run.indices, run.payloads, run.errors, position + run.stop)
                stretch = next(scan(file, position, self.log_key), None)  # a record of more than `max_bytes`, or damage
                if stretch is None or stretch.stop > end:
                    break
                position = stretch.stop
                if stretch.record is not None:
                    return self._page_of_one(stretch.record, position)
        return ResultPage(b"", [], [], position)

    def cursor(self, position: int) -> str:
        """A position as readers hold it. It carries a checksum, so that one made up is refused."""
        return f"{position:x}-{self._proof(position)}"

    def position(self, cursor: str) -> int:
        """The position of a cursor; 0 for the empty one. Raises ValueError for what is no cursor of this log."""
        if not cursor:
            return 0
        text, _, proof = cursor.partition("-")
        position = int(text, 16)
        if proof != self._proof(position):
            raise ValueError("not a cursor of this job")
        return position

    def _page_of_one(self, record: Record, stop: int) -> ResultPage:
        errors = [0] if record.kind is RecordKind.ERROR else []
        return self._page([record.index], [record.payload], errors, stop)

    def _page(
        self, indices: list[int], payloads: Sequence[bytes | memoryview], errors: list[int], stop: int
    ) -> ResultPage:
        rows = list(payloads)
        for place in errors:
            rows[place] = self._error_row(indices[place], bytes(payloads[place]))
        return ResultPage(b"".join(rows), indices, errors, stop)

    def _error_row(self, index: int, payload: bytes) -> bytes:
        error = decode_error(payload)
        return error_line(batch_request_id(self.job_digest, index, error.custom_id), error)

    def _proof(self, position: int) -> str:
        return xxhash.xxh3_64_hexdigest(b"cursor %d" % position, seed=self.log_key)
