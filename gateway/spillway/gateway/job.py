"""A batch job in this process: opened, drained line by line, sealed.

The job directory `<output>.spillway/` is the truth:

    lock            held (flock) by the process that runs the job; names its pid
    manifest.json   written once intake is done; what makes the job resumable
    lines.table     where the lines lie and in which order they run
    results.log     the ledger

Whatever is in it before there is a manifest is an intake that did not finish, and is done again. After sealing only the
manifest stays, so that running the same job again finds it complete.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import compress
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from spillway.api.errors import (
    InputChangedError,
    JobChangedError,
    JobCorruptError,
    JobError,
    LineError,
)
from spillway.api.lines import Body, KnownLine, Url, parse_line, read_known_line
from spillway.api.results import BodyHead, LineIds, Usage, body_of_result, line_ids, result_line, usage_of
from spillway.gateway.durable import remove, remove_twice
from spillway.gateway.families import Span, find
from spillway.gateway.intake import decode_error, encode_error, refusal, take_in
from spillway.gateway.ledger import Ledger
from spillway.gateway.manifest import VERSION, InputRecord, Manifest, SealedRecord, differences
from spillway.gateway.options import JobOptions, LineRules
from spillway.gateway.paths import JobLock, JobPaths
from spillway.gateway.reader import InputFile, Progress
from spillway.gateway.records import FILE_HEADER_BYTES, Record, RecordKind
from spillway.gateway.repairs import JobRepairs, LedgerRepairs
from spillway.gateway.seal import seal
from spillway.gateway.table import LineTable
from spillway.gateway.tail import ResultTail

MANIFEST, TABLE, LOG = "manifest.json", "lines.table", "results.log"


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A line that passed intake. `index` counts request lines from 0, `line_number` all lines of the file from 1.

    `head` opens the response body: its id and time are the job's, so that a resumed job writes the same bytes.
    """

    index: int
    custom_id: str
    url: Url
    line_number: int
    head: BodyHead
    raw: bytes
    """The line as it stands in the input."""


@dataclass(frozen=True, slots=True)
class PendingLine(RequestLine):
    """One that has no result yet, with its request read."""

    body: Body


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Lines of a job. `total` = `completed` + `failed` + `pending`."""

    total: int
    completed: int
    failed: int
    errors_by_code: dict[str, int] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        """Lines without a result."""
        return self.total - self.completed - self.failed


@dataclass(frozen=True, slots=True)
class _Begun:
    """What a job goes on with: no table once it is sealed. `mended`: the file was damaged and could be restored."""

    manifest: Manifest
    table: LineTable | None
    manifest_mended: bool = False
    table_mended: bool = False


@dataclass(frozen=True, slots=True)
class _LineName:
    custom_id: str
    ids: LineIds


class Job:
    """One batch file on its way to an output and an error file.

    `complete` and `fail` may be called from any thread; all else from one. Use it as a context manager, or `close` it.
    """

    def __init__(self, paths: JobPaths, begun: _Begun, lock: JobLock, source: InputFile, *, resumed: bool) -> None:
        """For `Job.open`."""
        manifest = begun.manifest
        self.paths = paths
        self.resumed = resumed
        """Whether an earlier run began it."""
        self.digest = manifest.digest()
        self._manifest, self._lock, self._source = manifest, lock, source
        self._under_way: dict[int, _LineName] = {}
        self._table: LineTable | None = None
        self._ledger: Ledger | None = None
        self._codes: Counter[str] = Counter()
        self._tallies = threading.Lock()  # over codes and tokens
        self._prompt_tokens = self._completion_tokens = 0
        self._begun, self._restored_errors, self._log_lost = begun, 0, False
        if manifest.sealed is None:
            self._table = begun.table
            log = paths.directory / LOG
            self._log_lost = not log.exists() or log.stat().st_size < FILE_HEADER_BYTES  # intake wrote more than that
            self._ledger = Ledger(log, manifest.num_lines, manifest.log_key, self._recover)
            self._restore_errors()

    @classmethod
    def open(cls, paths: JobPaths, options: JobOptions, progress: Progress | None = None) -> Self:
        """Takes in the input and begins a job, or goes on with the one that an earlier run left behind.

        Either way every line has been checked and every byte of the input read when this returns. `progress` is called
        with (bytes read, bytes in all). Raises a JobError: InputError, OutputPathError, OutputExistsError,
        JobLockedError, JobChangedError, JobCorruptError, InputChangedError, StorageError.
        """
        paths = paths.resolved()
        paths.check()
        source = InputFile(paths.input)
        try:
            if not paths.directory.exists() and not options.restart:
                paths.check_nothing_to_overwrite()
            lock = JobLock(paths.directory)
        except BaseException:
            source.close()
            raise
        try:
            former = None if options.restart else _resumable(paths, source, options, progress)
            begun = former or _begin(paths, source, options, progress)
            return cls(paths, begun, lock, source, resumed=former is not None)
        except BaseException:
            source.close()
            lock.release(remove_if_unused=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def sealed(self) -> bool:
        """Whether output and error files are written; then nothing is pending."""
        return self._manifest.sealed is not None

    @property
    def input_sha256(self) -> str:
        """Of the input as it was taken in, in hex."""
        return self._manifest.input.sha256

    @property
    def created(self) -> int:
        """Unix seconds of the job's beginning, kept over restarts."""
        return self._manifest.created

    @property
    def tail(self) -> ResultTail:
        """Readers' view of the log."""
        return ResultTail(self.paths.directory / LOG, self._manifest.log_key, self.digest)

    @property
    def repairs(self) -> JobRepairs:
        """Damage found and mended since it was opened."""
        ledger = LedgerRepairs() if self._ledger is None else self._ledger.repairs
        begun = self._begun
        return JobRepairs(ledger, self._restored_errors, begun.manifest_mended, begun.table_mended, self._log_lost)

    def counts(self) -> JobCounts:
        """How many lines ended how."""
        if self._ledger is None:
            sealed = self._manifest.sealed
            assert sealed is not None
            return JobCounts(self._manifest.num_lines, sealed.completed, sealed.failed, sealed.errors_by_code)
        return JobCounts(self._manifest.num_lines, self._ledger.num_results, self._ledger.num_errors, dict(self._codes))

    @property
    def tokens(self) -> Usage:
        """Of all results so far, as their bodies state them."""
        sealed = self._manifest.sealed
        if sealed is not None:
            return Usage(sealed.prompt_tokens, sealed.completion_tokens)
        with self._tallies:
            return Usage(self._prompt_tokens, self._completion_tokens)

    def pending(self) -> Iterator[PendingLine]:
        """Lines without a result, those with the longest common prompt prefix side by side, read one at a time.

        Raises InputChangedError if the input was written to.
        """
        return map(self.line, self.pending_indices())

    def pending_indices(self) -> Iterator[int]:
        """Indices of the lines that `pending` yields, without reading them."""
        if self._table is None or self._ledger is None:
            return
        for index in self._table.order:
            if not self._ledger.has(int(index)):
                yield int(index)

    @property
    def order(self) -> npt.NDArray[np.uint32]:
        """Lines that passed intake, in the order in which they should run, done or not: `[n] uint32`."""
        return np.zeros(0, dtype=np.uint32) if self._table is None else self._table.order

    def undone_places(self) -> npt.NDArray[np.bool_]:
        """By place in `order`: whether the line has no result yet. `[n] bool`, a copy."""
        if self._ledger is None:
            return np.zeros(len(self.order), dtype=bool)
        return self._ledger.undone()[self.order]

    def family(self, level: int, key: int) -> Span | None:
        """Where in `order` the lines stand whose prompts begin with what `key` stands for (see families.beginnings)."""
        return None if self._table is None else find(self._table.families[level], key)

    def line(self, index: int) -> PendingLine:
        """One line that passed intake, by index. Raises InputChangedError."""
        known = self.request_line(index)
        line = parse_line(known.raw, known.line_number, len(known.raw))
        if isinstance(line, LineError):  # it was valid at intake
            raise self._changed(known.line_number)
        return PendingLine(index, known.custom_id, known.url, known.line_number, known.head, known.raw, line.body)

    def request_line(self, index: int) -> RequestLine:
        """The same without its request read, for whoever passes it on. Raises InputChangedError."""
        return self.request_lines([index])[0]

    def request_lines(self, indices: Iterable[int]) -> list[RequestLine]:
        """`request_line` of many."""
        found = []
        for index, number, raw, line in self._read(list(indices)):
            name = self._under_way[index] = self._name_of(index, line)
            head = BodyHead(name.ids.body, self.created, line.body.model)
            found.append(RequestLine(index, line.custom_id, line.url, number, head, raw))
        return found

    def is_done(self, index: int) -> bool:
        """Whether a line has a result or an error."""
        return self._ledger is None or self._ledger.has(index)

    def complete(self, index: int, body: bytes) -> bool:
        """Records the response body (JSON) of a line. False if the line has a result already: the first one stays.

        The result survives the process at once, and a power cut within about a second. Raises StorageError.
        """
        return self.complete_all([(index, body, usage_of(body))]) == 1

    def complete_all(self, results: Iterable[tuple[int, bytes, Usage]]) -> int:
        """`complete` of many lines in one write, each with its tokens; how many were recorded.

        Raises StorageError: then none was.
        """
        if self._ledger is None:
            return 0
        records, used = [], []
        for index, body, tokens in results:
            if not self._ledger.has(index):
                name = self._name(index)
                used.append(tokens)
                records.append(Record(index, RecordKind.RESULT, result_line(name.ids, name.custom_id, body)))
        recorded = self._ledger.append_all(records)
        for record in records:
            self._under_way.pop(record.index, None)
        self._count(*compress(used, recorded))
        return sum(recorded)

    def fail(self, index: int, error: LineError) -> bool:
        """Records why a line has no result; its number and custom_id are filled in here. Else as `complete`."""
        if self._ledger is None or self._table is None or self._ledger.has(index):
            return False
        error = replace(error, custom_id=self._name(index).custom_id, line=int(self._table.lines[index]["number"]))
        recorded = self._ledger.append(Record(index, RecordKind.ERROR, encode_error(error)))
        with self._tallies:
            self._codes[str(error.code)] += int(recorded)
        self._under_way.pop(index, None)
        return recorded

    def seal(self, *, keep_log: bool = False) -> JobCounts:
        """Writes output and error files in input order, each in one piece, and drops the ledger. Idempotent.

        `keep_log` leaves the log for readers of `tail` who are not through with it.
        Raises JobError while lines are pending, JobCorruptError if a result was damaged on disk since it was written
        (run again: that line is redone), StorageError.
        """
        if self._ledger is None:
            return self.counts()
        if self.counts().pending:
            raise JobError(f"{self.counts().pending} lines have no result yet", "Run the job to its end first.")
        try:
            sealed = seal(self._ledger, self.digest, self.paths, self.tokens)
        except JobCorruptError:
            self._restore_errors()
            raise
        self._manifest = msgspec.structs.replace(self._manifest, sealed=sealed)
        self._manifest.save(self.paths.directory / MANIFEST)
        self._ledger.close()
        self._ledger = self._table = None
        remove(self.paths.directory / TABLE)
        if not keep_log:
            remove(self.paths.directory / LOG)
        return self.counts()

    @property
    def durable_bytes(self) -> int:
        """How far `tail` may be read now; results behind it could still be lost to a power cut. 0 once sealed."""
        return 0 if self._ledger is None else self._ledger.durable_bytes

    def close(self) -> None:
        """Makes results durable and lets go of the job. Safe to call twice. Raises StorageError."""
        try:
            if self._ledger is not None:
                self._ledger.close()
        finally:
            self._source.close()
            self._lock.release()

    def _recover(self, record: Record) -> None:
        if record.kind is RecordKind.RESULT:
            self._count(usage_of(body_of_result(record.payload)))

    def _count(self, *results: Usage) -> None:
        with self._tallies:
            self._prompt_tokens += sum(used.prompt_tokens for used in results)
            self._completion_tokens += sum(used.completion_tokens for used in results)

    def _restore_errors(self) -> None:
        """Lines that intake refused never run: where damage took their error, they are checked again."""
        assert self._ledger is not None
        assert self._table is not None
        codes = Counter(str(decode_error(record.payload).code) for record in self._ledger.errors())
        lost = self._ledger.undone()
        lost[self._table.order] = False
        for index in np.flatnonzero(lost):
            error = refusal(self._source, self._table.lines[index], LineRules.named(self._manifest.options))
            self._ledger.append(Record(int(index), RecordKind.ERROR, encode_error(error)))
            self._restored_errors += 1
            codes[str(error.code)] += 1
        with self._tallies:
            self._codes = codes

    def _read(self, indices: list[int]) -> Iterator[tuple[int, int, bytes, KnownLine]]:
        """For each line its index, its number in the file, its bytes and its names."""
        assert self._table is not None
        rows = self._table.lines[indices].tolist()
        raws = self._source.read_lines((offset, length) for offset, length, _ in rows)
        for index, (_, _, number), raw in zip(indices, rows, raws, strict=True):
            try:
                yield index, number, raw, read_known_line(raw)
            except ValueError:  # it was valid at intake
                raise self._changed(number) from None

    def _changed(self, number: int) -> InputChangedError:
        return InputChangedError(
            f"line {number} of {self.paths.input} is not what it was", "Put the former content back and run again."
        )

    def _name(self, index: int) -> _LineName:
        """What a line is called: known if it came from `pending`, else read again."""
        known = self._under_way.get(index)
        if known is None:
            ((_, _, _, line),) = self._read([index])
            known = self._name_of(index, line)
        return known

    def _name_of(self, index: int, line: KnownLine) -> _LineName:
        return _LineName(line.custom_id, line_ids(self.digest, index, line.custom_id, line.url))


def _resumable(paths: JobPaths, source: InputFile, options: JobOptions, progress: Progress | None) -> _Begun | None:
    """What to go on with, or None if the job must begin. Raises JobChangedError, OutputExistsError."""
    loaded = Manifest.load(paths.directory / MANIFEST)
    if loaded is None:
        paths.check_nothing_to_overwrite()
        return None
    manifest, mended = loaded
    changes = differences(manifest, source.digest(progress).hex(), options)
    if changes:
        raise JobChangedError(paths.directory, changes)
    if manifest.sealed is None:
        return _with_table(paths, source, manifest, mended)
    _drop_working_files(paths)
    return _Begun(manifest, None, mended) if _check_sealed_files(paths, manifest.sealed) else None


def _with_table(paths: JobPaths, source: InputFile, manifest: Manifest, mended: bool) -> _Begun:
    """The manifest with its table of lines, which follows from the input and is made anew if it is damaged.

    Raises JobCorruptError if even the new one does not fit the manifest.
    """
    try:
        table, damaged = LineTable.load(paths.directory / TABLE), False
    except JobCorruptError:
        damaged = True
    if damaged or len(table.lines) != manifest.num_lines:
        scratch = paths.directory / f"{LOG}.scratch"  # intake writes its errors, which the log has already
        try:
            table, damaged = take_in(source, scratch, manifest.log_key, LineRules.named(manifest.options)).table, True
        finally:
            scratch.unlink(missing_ok=True)
        table.save(paths.directory / TABLE)
        table = LineTable.load(paths.directory / TABLE)
    if len(table.lines) != manifest.num_lines:
        raise JobCorruptError(f"{paths.directory} contradicts itself", "Pass --restart to start the job over.")
    return _Begun(manifest, table, mended, damaged)


def _check_sealed_files(paths: JobPaths, sealed: SealedRecord) -> bool:
    """Whether the files of a finished job are there. False if the output was removed: then it is to be made again."""
    if not paths.output.exists():
        return False
    changes = []
    if paths.output.stat().st_size != sealed.output_bytes:
        changes.append(f"the output {paths.output} was changed since it was written")
    error_bytes = paths.errors.stat().st_size if paths.errors.exists() else None
    if error_bytes != sealed.error_bytes:
        changes.append(f"the error file {paths.errors} is not the one that was written")
    if changes:
        raise JobChangedError(paths.directory, tuple(changes))
    return True


def _begin(paths: JobPaths, source: InputFile, options: JobOptions, progress: Progress | None) -> _Begun:
    remove_twice(paths.directory / MANIFEST)  # first: without it the rest is an unfinished intake
    _drop_working_files(paths)
    log_key = secrets.randbits(64)
    try:
        intake = take_in(source, paths.directory / LOG, log_key, options.rules, progress)
    except BaseException:
        _drop_working_files(paths)
        raise
    intake.table.save(paths.directory / TABLE)
    manifest = Manifest(
        version=VERSION,
        created=int(time.time()),
        log_key=log_key,
        input=InputRecord(str(paths.input), source.stamp.size_bytes, intake.input_digest.hex()),
        options=options.identity(),
        num_lines=len(intake.table.lines),
    )
    manifest.save(paths.directory / MANIFEST)
    return _Begun(manifest, LineTable.load(paths.directory / TABLE))


def _drop_working_files(paths: JobPaths) -> None:
    for name in (LOG, TABLE):
        remove(paths.directory / name)
