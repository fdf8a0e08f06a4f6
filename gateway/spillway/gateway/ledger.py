"""The append-only log of finished lines: one checksummed record each, first one wins.

What survives: a record is handed to the kernel before `append` returns, so killing the process loses none. A power cut
can lose the records of the last second (or of the last MiB, if that fills sooner) and of the sync then under way. Lost
records are lines without a result: they run again. None is doubled: a line counts as done only by a whole record.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spillway.api.errors import StorageError
from spillway.gateway.records import FILE_HEADER_BYTES, Record, RecordKind, encode, file_header, read_at, scan
from spillway.gateway.repairs import LedgerRepairs
from spillway.gateway.sync import GroupSync

SYNC_INTERVAL_S = 1.0
SYNC_BYTES = 1024 * 1024
_SCAN_BUFFER_BYTES = 1024 * 1024


class Ledger:
    """The open log. Calls may come from any thread of one process (the job's lock keeps other processes out)."""

    def __init__(
        self, path: Path, num_lines: int, key: int, on_record: Callable[[Record], None] = lambda _: None
    ) -> None:
        """Opens or creates the log of `num_lines` lines; `key` (u64) is the seed of its checksums.

        `on_record` is told of every record that is in force, while it is being opened.
        Memory: 8 bytes a line. Raises StorageError if it cannot be read or written. Whatever does not verify under the
        key is damage, so a log of another job is one with no results.
        """
        self._path, self._key, self._on_record = path, key, on_record
        self.num_lines = num_lines
        self._offsets = np.zeros(num_lines, dtype=np.int64)  # of the record; 0: none; negated: an error's
        self._lock = threading.Lock()
        self.num_results = self.num_errors = 0
        self.repairs = LedgerRepairs()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(
                f"cannot open {path}: {error.strerror}", "Check the disk and its permissions."
            ) from error
        try:
            self._end = self._recover()
        except OSError as error:
            os.close(self._fd)
            raise StorageError(f"cannot read {path}: {error.strerror}", "Check the disk.") from error
        except BaseException:
            os.close(self._fd)
            raise
        self._group_sync = GroupSync(self._fd, SYNC_INTERVAL_S, SYNC_BYTES)
        self._group_sync.wrote(self._end)

    def close(self) -> None:
        """Makes everything durable and closes the file. Safe to call twice. Raises StorageError."""
        if self._fd < 0:
            return
        try:
            self._group_sync.close()
        finally:
            os.close(self._fd)
            self._fd = -1

    def sync(self) -> None:
        """Returns once all records appended so far would survive a power cut. Raises StorageError."""
        self._group_sync.sync()

    @property
    def durable_bytes(self) -> int:
        """Length of the part of the log, in whole records, that would survive a power cut."""
        return self._group_sync.synced_bytes

    def has(self, index: int) -> bool:
        """Whether the line has a record."""
        return bool(self._offsets[index])

    def undone(self) -> npt.NDArray[np.bool_]:
        """Which lines have no record: `[num_lines] bool`, a copy."""
        return np.equal(self._offsets, 0)

    def append(self, record: Record) -> bool:
        """Writes the record of a line. False, and nothing written, if the line has one already.

        Raises StorageError if the disk is full or failing; the log then ends with the record before this one.
        """
        return self.append_all([record])[0]

    def append_all(self, records: Sequence[Record]) -> list[bool]:
        """`append` of many in one write: for each, whether it was written. Raises StorageError: then none was."""
        blobs = [encode(record, self._key) for record in records]
        with self._lock:
            end, offsets = self._end, dict[int, int]()
            fresh = [not self.has(record.index) for record in records]
            for number, record in enumerate(records):
                fresh[number] = fresh[number] and record.index not in offsets
                if fresh[number]:
                    offsets[record.index] = end
                    end += len(blobs[number])
            self._write(b"".join(compress(blobs, fresh)))
            for record in compress(records, fresh):
                self._note(record, offsets[record.index])
            self._end = end
        self._group_sync.wrote(end)
        return fresh

    def read(self, index: int) -> Record | None:
        """The record of a line, verified. None if there is none.

        None also if it was damaged since the log was opened: counted in `repairs`, and the line counts as undone.
        """
        offset = abs(int(self._offsets[index]))
        if offset == 0:
            return None
        try:
            record = read_at(self._fd, offset, self._key)
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror}", "Check the disk.") from error
        if record is None or record.index != index:
            self._forget(index)
            return None
        return record

    def errors(self) -> Iterator[Record]:
        """Records of failed lines, in order of the file."""
        for index in np.flatnonzero(self._offsets < 0):
            record = self.read(int(index))
            if record is not None:
                yield record

    def _note(self, record: Record, offset: int) -> None:
        if record.kind is RecordKind.RESULT:
            self._offsets[record.index] = offset
            self.num_results += 1
        else:
            self._offsets[record.index] = -offset
            self.num_errors += 1

    def _forget(self, index: int) -> None:
        with self._lock:
            self.num_results -= int(self._offsets[index] > 0)
            self.num_errors -= int(self._offsets[index] < 0)
            self._offsets[index] = 0
            self.repairs.corrupt_records += 1

    def _write(self, blob: bytes) -> None:
        view, position = memoryview(blob), self._end
        try:
            while view:
                written = os.pwrite(self._fd, view, position)
                view, position = view[written:], position + written
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise StorageError(
                f"cannot write a result to {self._path}: {error.strerror}",
                "Make room on the disk and run again: finished lines are kept.",
            ) from error

    def _recover(self) -> int:
        """Walks the log, fills the offsets, cuts a torn tail. Returns where the next record goes."""
        size = os.fstat(self._fd).st_size
        header = file_header(self._key)
        if os.pread(self._fd, FILE_HEADER_BYTES, 0) != header:
            self.repairs.corrupt_records += int(size > 0)
            os.pwrite(self._fd, header, 0)
        good_end, damaged = FILE_HEADER_BYTES, 0
        with os.fdopen(os.dup(self._fd), "rb", buffering=_SCAN_BUFFER_BYTES) as file:
            for stretch in scan(file, good_end, self._key):
                if stretch.record is None:
                    damaged += 1
                    continue
                self._take(stretch.record, stretch.start)
                self.repairs.corrupt_records += damaged
                good_end, damaged = stretch.stop, 0
        if good_end < size:
            self.repairs.torn_bytes = size - good_end
            os.ftruncate(self._fd, good_end)
        return good_end

    def _take(self, record: Record, offset: int) -> None:
        if record.index >= len(self._offsets) or self.has(record.index):
            self.repairs.repeated_records += 1
        else:
            self._note(record, offset)
            self._on_record(record)
