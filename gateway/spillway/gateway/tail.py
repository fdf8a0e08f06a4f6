"""Results in the order in which lines finished, read from the log while it grows, from any point on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from spillway.api.results import batch_request_id, error_line
from spillway.gateway.intake import decode_error
from spillway.gateway.records import FILE_HEADER_BYTES, Record, RecordKind, scan

_BUFFER_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ResultRow:
    """A row of the output file, or of the error file; newline included."""

    index: int
    is_error: bool
    json: bytes


@dataclass(frozen=True, slots=True)
class ResultTail:
    """The log of one job, for readers. It needs no lock: records never change once they are written."""

    log: Path
    log_key: int
    job_digest: bytes

    def read(self, start: int, end: int, max_bytes: int) -> tuple[list[ResultRow], int]:
        """Rows of the records in [start, end) of the log, until they make up `max_bytes`; and where to go on.

        `start` is 0 or what an earlier call returned; `end` is where whole records end that will not be lost
        (Ledger.durable_bytes while the job runs). Damaged stretches are passed over: their lines come later.
        """
        rows: list[ResultRow] = []
        position, size = max(start, FILE_HEADER_BYTES), 0
        if position >= end:
            return rows, start
        with self.log.open("rb", buffering=_BUFFER_BYTES) as file:
            for stretch in scan(file, position, self.log_key):
                if stretch.stop > end or size >= max_bytes:
                    break
                position = stretch.stop
                if stretch.record is not None:
                    rows.append(self._row(stretch.record))
                    size += len(rows[-1].json)
        return rows, position

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

    def _row(self, record: Record) -> ResultRow:
        if record.kind is RecordKind.RESULT:
            return ResultRow(record.index, False, record.payload)
        error = decode_error(record.payload)
        name = batch_request_id(self.job_digest, record.index, error.custom_id)
        return ResultRow(record.index, True, error_line(name, error))

    def _proof(self, position: int) -> str:
        return xxhash.xxh3_64_hexdigest(b"cursor %d" % position, seed=self.log_key)
