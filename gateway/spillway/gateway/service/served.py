"""One job of the service, from upload to final state: what it is doing, who works on it, how it ends.

States follow from three things: the spec on disk (what is wished, how it ended), whether intake is done, and whether
results are being sealed. Slow work (intake, failing the rest, sealing) runs in threads; everything else in the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from spillway.api.errors import (
    ErrorCode,
    JobCorruptError,
    JobError,
    JobLockedError,
    LineError,
    StorageError,
)
from spillway.api.results import Usage
from spillway.gateway.families import Span, beginnings
from spillway.gateway.job import MANIFEST, Job, JobCounts, RequestLine
from spillway.gateway.manifest import Manifest
from spillway.gateway.repairs import MANIFEST_MENDED
from spillway.gateway.service.bodies import checked_usage
from spillway.gateway.service.errors import ConflictError, DamagedError, InvalidError, Reason, ResourceError
from spillway.gateway.service.house import House
from spillway.gateway.service.job_trace import JobTrace, Report
from spillway.gateway.service.leases import GivenUp, Lease, LeaseBook
from spillway.gateway.service.pace import Pace, Sample
from spillway.gateway.service.sealed import SealedResults
from spillway.gateway.service.spec import End, JobSpec, Outcome, Wish
from spillway.gateway.service.state import State
from spillway.gateway.service.store import JobFolder
from spillway.gateway.service.threads import to_the_end
from spillway.gateway.tail import ResultTail

_log = logging.getLogger(__name__)

RETRY_S = 5.0
_ENDS = {
    Wish.RUN: End.COMPLETED,
    Wish.PAUSE: End.COMPLETED,
    Wish.CANCEL: End.CANCELLED,
    Wish.EXPIRE: End.EXPIRED,
}
_UNFINISHED = {
    Wish.CANCEL: (ErrorCode.CANCELLED, "the job was cancelled before this line was done"),
    Wish.EXPIRE: (ErrorCode.EXPIRED, "the job's deadline passed before this line was done"),
}


class ServedJob:
    """A job in the service. Methods are for the event loop's thread unless they say otherwise."""

    def __init__(self, spec: JobSpec, folder: JobFolder, house: House) -> None:
        self.spec, self.folder, self._house = spec, folder, house
        self._rules, self._announce, self._service_counts = house.rules, house.announce, house.counts
        self._job: Job | None = None
        self._book: LeaseBook | None = None
        self._ending = False
        self.finalizing_s: float | None = None if spec.outcome is None else spec.outcome.finalizing_s
        """When its files began to be written, in Unix seconds."""
        self._hurried = threading.Event()
        self._tail: ResultTail | None = None
        self._sealed: SealedResults | None = None
        self._changed = asyncio.Event()
        self._pace = Pace()
        self.trace = JobTrace(house.traces, spec)
        self._next_keys: tuple[int, Sequence[int]] = (-1, ())  # of the line at that place of the order
        self.version = 0
        """Goes up with every change."""
        self.repairs: list[str] = []
        """What was found damaged and mended since the gateway started, a sentence each."""
        self.trouble = ""
        """What keeps the gateway from going on with the job, in one sentence."""
        if spec.outcome is not None:
            self._remember_sealed()

    @property
    def state(self) -> State:
        """Derived, never stored."""
        if self.spec.outcome is not None:
            return State[self.spec.outcome.end.name]
        if self._job is None:
            return State.VALIDATING
        if self._ending:
            return State.FINALIZING
        return State.PAUSED if self.spec.wish is Wish.PAUSE else State.RUNNING

    @property
    def num_leased(self) -> int:
        """Lines that an agent works on."""
        return 0 if self._book is None else self._book.num_leased

    @property
    def num_leases(self) -> int:
        """Leases that hold lines of it."""
        return 0 if self._book is None else self._book.num_leases

    @property
    def begun_s(self) -> int | None:
        """When its lines were checked and could run, in Unix seconds."""
        if self._job is not None:
            return self._job.created
        return None if self._sealed is None else self._sealed.begun_s

    def counts(self) -> JobCounts:
        """All zero until intake is done."""
        if self._job is not None:
            return self._job.counts()
        return JobCounts(0, 0, 0) if self._sealed is None else self._sealed.counts

    def tokens(self) -> Usage:
        """Of all results so far."""
        if self._job is not None:
            return self._job.tokens
        return Usage(0, 0) if self._sealed is None else self._sealed.tokens

    def tokens_per_s(self, now_s: float) -> float:
        """Prompt and completion tokens of lines that ended in the last minute, per second."""
        return self._pace.tokens_per_s(self._sample(now_s)) if self.state is State.RUNNING else 0.0

    def end_band_s(self, now_s: float) -> tuple[float, float] | None:
        """Between how many seconds from now the last line should end; None while nobody can tell."""
        if self.state is not State.RUNNING:
            return None
        return self._pace.end_band_s(self._sample(now_s), self.counts().pending)

    def wish(self, wish: Wish) -> None:
        """Changes what is to happen, durably. Raises ConflictError if the job is past that, ResourceError."""
        if self.spec.wish is wish:
            return
        if self.state.final or self._ending or self.spec.wish in _UNFINISHED:
            raise ConflictError(Reason.JOB_FINAL, f"job {self.spec.id} is {self.state.name.lower()} or about to be")
        try:
            self._save(msgspec.structs.replace(self.spec, wish=wish, wish_s=time.time()))
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"the job's spec cannot be written: {error.strerror}") from error
        if wish in _UNFINISHED and self._book is not None:
            self._book.revoke()
        self._announce()

    # the life of a job

    async def live(self) -> None:
        """Carries the job from where it is to its final state; waits for `touch` in between. Cancelling it is safe."""
        while self.spec.outcome is None:
            if self._job is None:
                await self._open()
            elif self._may_end():
                await self._end(self._job)
            else:
                await self._changed.wait()

    def hurry(self) -> None:
        """Has slow work in threads end early; `live` is about to be cancelled."""
        self._hurried.set()

    def close(self) -> None:
        """Lets go of the job's files. Nothing is lost: it goes on from there when it is opened again."""
        if self._job is not None:
            self._job.close()

    def touch(self) -> None:
        """Wakes whoever waits for a change."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change; take a new one after each."""
        return self._changed

    async def _open(self) -> None:
        checking = self.trace.begin("validate")
        try:
            loaded = await asyncio.to_thread(Manifest.load, self.folder.paths.directory / MANIFEST)
            if loaded is not None and loaded[1]:
                self.mended([MANIFEST_MENDED])
            if loaded is not None and loaded[0].sealed is not None:  # stopped between sealing and saying so
                await self._finish(_ENDS[self.spec.wish])
                return
            self._job = await self._open_in_thread()
        except (StorageError, JobLockedError) as error:
            self._stumble(error)
            await asyncio.sleep(RETRY_S)
        except JobError as error:
            checking.end(error=error.message)
            await self._finish(End.FAILED, error.message)
        else:
            checking.end({"spillway.lines": self.counts().total, "spillway.resumed": self._job.resumed})
            if self._job.input_sha256 != self.spec.input_sha256:
                await self._finish(End.FAILED, "the input was damaged on disk after it was uploaded")
                return
            self.trouble = ""
            self._tail = self._job.tail
            self._book = self._new_book(self._job)
            self.mended(self._job.repairs.sentences())
            self.touch()
            self._announce()

    async def _end(self, job: Job) -> None:
        wish = self.spec.wish
        self._ending, self.finalizing_s = True, time.time()
        self.touch()
        sealing = self.trace.begin("seal")
        try:
            self._house.check()
            if wish in _UNFINISHED:
                await to_the_end(self._fail_the_rest, job, *_UNFINISHED[wish])
            await to_the_end(partial(job.seal, keep_log=True))
        except JobCorruptError:  # a result was damaged on disk: its line is pending again
            sealing.end(error="a result was damaged")
            self._book = self._new_book(job)
            self.mended(["results were damaged on disk since they were written: their lines run again"])
            self._announce()
        except StorageError as error:
            self._stumble(error)
            await asyncio.sleep(RETRY_S)
        else:
            sealing.end()
            await self._finish(_ENDS[wish])
        finally:
            self._ending = False
            self.touch()

    async def _open_in_thread(self) -> Job:
        opening = asyncio.ensure_future(
            asyncio.to_thread(Job.open, self.folder.paths, self.spec.request.options(), self._stop_if_hurried)
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                opening.result().close()
            raise

    def _stop_if_hurried(self, _done_bytes: int, _total_bytes: int) -> None:
        if self._hurried.is_set():
            raise _HurriedError

    def _fail_the_rest(self, job: Job, code: ErrorCode, message: str) -> None:
        """For a thread."""
        for index in job.pending_indices():
            if self._hurried.is_set():
                raise _HurriedError
            job.fail(index, LineError(code, message, 0))

    def _may_end(self) -> bool:
        return self.spec.wish in _UNFINISHED or self.counts().pending == 0

    async def _finish(self, end: End, message: str = "") -> None:
        spec = msgspec.structs.replace(self.spec, outcome=Outcome(end, time.time(), message, self.finalizing_s))
        while self.spec is not spec:
            try:
                self._save(spec)
            except OSError as error:
                self.trouble = f"the job's spec cannot be written: {error.strerror}"
                self.touch()
                await asyncio.sleep(RETRY_S)
        self.close()
        self._job = self._book = None
        self._remember_sealed()
        self.trace.ended(self.spec, self.counts(), self.tokens())
        self.touch()

    def _stumble(self, error: JobError) -> None:
        """The disk failed, or the input was touched: closes the job. Opening it again finds out what is whole."""
        self.trouble = error.message
        with contextlib.suppress(StorageError):  # the same trouble once more
            self.close()
        self._job = self._book = None
        self.touch()

    def _remember_sealed(self) -> None:
        self._sealed = SealedResults.load(self.folder.paths, discarded=self.spec.discarded)
        self._tail, self.trouble = self._sealed.tail, self._sealed.trouble
        self.mended(self._sealed.mended)

    # lines

    @property
    def has_lines(self) -> bool:
        """Whether there may be lines to hand out."""
        return self.state is State.RUNNING and self._book is not None and self._book.has_free

    def family(self, level: int, key: int) -> Span | None:
        """Where lines stand that begin with what the key stands for (see `families`), if any may be handed out."""
        span = None if self._job is None else self._job.family(level, key)
        return span if span is not None and self._book is not None and self._book.free_in(span) else None

    def next_keys(self) -> Sequence[int]:
        """What the line begins with that would go out next, at each level of `families`."""
        place = None if self._book is None or self._job is None else self._book.head()
        if place is None or self._job is None:
            return ()
        if place != self._next_keys[0]:
            self._next_keys = (place, self.keys(int(self._job.order[place])))
        return self._next_keys[1]

    def keys(self, index: int) -> Sequence[int]:
        """What a line begins with, at each level of `families`."""
        if self._job is None:
            return ()
        try:
            return beginnings(self._job.line(index).body)
        except JobError as error:
            self._stumble(error)
            return ()

    def take(
        self, worker: str, max_lines: int, now_s: float, span: Span | None = None
    ) -> tuple[Lease, list[tuple[RequestLine, int]]] | None:
        """Leases lines (of a part of the order), each with the number of its attempt. None if there are none."""
        if self.state is not State.RUNNING or self._book is None or self._job is None:
            return None
        lease = self._book.take(worker, max_lines, now_s, span)
        if lease is None:
            return None
        lease.traceparent = self.trace.leased(lease)
        try:
            found = self._job.request_lines(lease.lines)
            lines = [(line, self._book.attempt(line.index)) for line in found]
        except JobError as error:
            self._stumble(error)
            return None
        self.touch()
        return lease, lines

    def renew(self, lease_id: str, now_s: float) -> bool:
        """False if the lease is lost, or not of this job."""
        return self._book is not None and self._book.renew(lease_id, now_s)

    def complete(self, results: Iterable[tuple[int, bytes]], report: Report) -> int:
        """Keeps results, brought as `report` says; returns how many were new: none once the job has ended.

        Raises InvalidError, before any is kept, if one is for no line of the job or no JSON object; ResourceError if
        they cannot be kept now: the worker should try again.
        """
        checked = [(self._checked_index(index), body, checked_usage(body)) for index, body in results]
        if self.state.final:
            return 0
        job, book = self._open_job()
        taking_in = self.trace.begin_report(report)
        with self._stumbling():
            accepted = job.complete_all(checked)
            for index, _, _ in checked:
                book.finished(index)
        taking_in.end({"spillway.results": len(checked), "spillway.accepted": accepted})
        self.touch()
        return accepted

    def fail(self, lease_id: str, error: LineError, index: int, *, retryable: bool) -> bool:
        """Notes a failed attempt. True if it counted: the lease held the line, or the failure is for good."""
        index = self._checked_index(index)
        if self.state.final:
            return False
        job, book = self._open_job()
        with self._stumbling():
            if retryable:
                counts = book.holds(lease_id, index)
                given_up = book.failed(lease_id, index, f"{error.code}: {error.message}")
                self._give_up(job, [given_up] if given_up is not None else [])
                self._announce()
            else:
                counts = job.fail(index, error)
                book.finished(index)
        self.touch()
        return counts

    def give_back(self, lease_id: str) -> None:
        """Takes back what the lease has not finished."""
        if self._book is not None:
            self._book.give_back(lease_id)
            self.touch()
            self._announce()

    def tick(self, now_s: float) -> None:
        """Takes back lines of leases that ran out, minds the deadline, and notes the pace."""
        if self.num_leased:
            self._pace.note(self._sample(now_s))
        else:
            self._pace.pause()
        deadline_s = self.spec.request.deadline_s
        running = not self.state.final and not self._ending and self.spec.wish not in _UNFINISHED
        if running and deadline_s is not None and time.time() >= deadline_s:
            with contextlib.suppress(ResourceError):  # the disk is full: the next tick tries again
                self.wish(Wish.EXPIRE)
        if self._job is not None and self._book is not None and self._book.num_leased:
            before, held, failed = self._book.num_leased, self._book.num_leases, self.counts().failed
            with contextlib.suppress(ResourceError), self._stumbling():
                given_up = self._book.expire(now_s)
                self._service_counts.leases_expired += held - self._book.num_leases
                self._give_up(self._job, given_up)
                self._service_counts.lines_failed += self.counts().failed - failed
            if self.num_leased != before:
                self.touch()
                self._announce()

    # results

    def tail(self) -> tuple[ResultTail, int] | None:
        """The log, and how far it may be read; None before intake is done."""
        if self._tail is None:
            return None
        if self._job is not None and not self._job.sealed:
            return self._tail, self._job.durable_bytes
        return self._tail, self._tail.log.stat().st_size if self._tail.log.exists() else 0

    def whole_file(self, path: Path) -> Path | None:
        """A sealed file, or None if it was not needed. Raises DamagedError if it is not what was written."""
        if self.trouble:
            raise DamagedError(self.trouble, "Submit the input again.")
        return path if path.exists() else None

    def discard(self, path: Path) -> None:
        """Removes a sealed file for good, and the log, which has its rows. Raises ConflictError, ResourceError."""
        if not self.state.final:
            raise ConflictError(Reason.JOB_NOT_FINAL, f"job {self.spec.id} is {self.state.name.lower()}")
        try:
            self._save(msgspec.structs.replace(self.spec, discarded=True))
            (self.folder.paths.directory / "results.log").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"the file cannot be removed: {error.strerror}") from error

    def expire_files(self, now_s: float) -> None:
        """Removes the files that it wrote if they are past their time. Raises ResourceError."""
        if self.spec.files_expired(now_s):
            for path in (self.folder.paths.output, self.folder.paths.errors):
                if path.exists():
                    self.discard(path)

    def mended(self, sentences: Sequence[str]) -> None:
        """Notes what was mended: in the log of the gateway, and for whoever looks at the job."""
        for sentence in sentences:
            _log.warning("job %s: %s", self.spec.id, sentence)
        self.repairs += sentences

    def _sample(self, now_s: float) -> Sample:
        counts, tokens = self.counts(), self.tokens()
        return Sample(now_s, counts.completed + counts.failed, tokens.prompt_tokens + tokens.completion_tokens)

    def _new_book(self, job: Job) -> LeaseBook:
        return LeaseBook(job, self._rules, self.spec.id, self.trace.lease_over)

    def _give_up(self, job: Job, lines: list[GivenUp]) -> None:
        for line in lines:
            history = "; ".join(line.history)
            message = f"given up after {len(line.history)} attempts: {history}"
            job.fail(line.index, LineError(ErrorCode.INTERNAL, message, 0))

    def _open_job(self) -> tuple[Job, LeaseBook]:
        if self._job is None or self._book is None:
            raise ResourceError(Reason.STORAGE, self.trouble or f"job {self.spec.id} is being opened", "Try again.")
        return self._job, self._book

    @contextlib.contextmanager
    def _stumbling(self) -> Iterator[None]:
        """Turns trouble of the job with its files into a refusal, and has the job opened anew."""
        try:
            yield
        except JobError as error:
            self._stumble(error)
            raise ResourceError(Reason.STORAGE, error.message, "Try again.") from error

    def _checked_index(self, index: int) -> int:
        if not 0 <= index < self.counts().total:
            if not self.state.final:
                self._open_job()  # while it is being opened nobody knows how many lines it has
            raise InvalidError(f"job {self.spec.id} has no line {index}")
        return index

    def _save(self, spec: JobSpec) -> None:
        spec.save(self.folder.spec)
        self.spec = spec
        self.touch()


class _HurriedError(Exception):
    """Ends slow work early because the gateway stops."""
