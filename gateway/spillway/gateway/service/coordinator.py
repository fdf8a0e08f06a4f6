"""All jobs of the service: which exist, whose lines go next, and who waits for what. Lives in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from spillway.api.errors import LineError
from spillway.api.tracing import Traces
from spillway.gateway.service.claim import Claim
from spillway.gateway.service.counts import ServiceCounts
from spillway.gateway.service.dispatch import Dispatcher, Grant
from spillway.gateway.service.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidError,
    NotFoundError,
    Reason,
    ResourceError,
)
from spillway.gateway.service.fetch import InputSources
from spillway.gateway.service.fleet import Fleet
from spillway.gateway.service.house import House
from spillway.gateway.service.job_trace import Report, begin_trace
from spillway.gateway.service.leases import LeaseRules
from spillway.gateway.service.limits import CallRate, Holdings, Limits, Usage
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.spec import JobRequest, JobSpec, Wish
from spillway.gateway.service.state import State
from spillway.gateway.service.store import JobStore, LinkedInput, StoredInput, Upload
from spillway.gateway.service.threads import to_the_end

log = logging.getLogger(__name__)

TICK_S = 0.25
DEFAULT_MAX_INPUT_BYTES = 64 << 30
AGENT_SILENCE_S = 30.0
"""After so long without a call for lines, a model counts as served by nobody."""
MAX_LEASE_LINES = 4096
Shelved = Callable[[str], dict[str, int]]
"""Sizes of the inputs that a tenant has outside of jobs, by digest; may block."""
SWEEP_S = 10.0
"""So often jobs are removed that ended long enough ago."""
_WAITING = {
    State.VALIDATING: "its lines are being checked",
    State.PAUSED: "it is paused until somebody resumes it",
}


@dataclass(frozen=True, slots=True)
class Peers:
    """How gateways over one data directory reach each other. `host` is this one's, as the others know it, if that is
    not where it listens. With TLS they trust each other by `authority` (None: those of the system); `name` is what
    their certificates say where that is not the host.
    """

    host: str | None = None
    authority: Path | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Limits and times of a gateway; where it keeps its jobs, and its peers.

    `retention_s`: jobs are removed so long after they ended; None: never.
    """

    data: Path
    max_input_bytes: int = DEFAULT_MAX_INPUT_BYTES
    leases: LeaseRules = field(default_factory=LeaseRules)
    limits: Limits = field(default_factory=Limits)
    retention_s: float | None = None
    sources: InputSources = field(default_factory=InputSources)
    traces: Traces = field(default_factory=Traces)
    peers: Peers = field(default_factory=Peers)


class Coordinator:
    """The service without its wire, as long as its claim lasts. Methods are for the event loop's thread."""

    def __init__(self, config: ServiceConfig, claim: Claim) -> None:
        """Raises OSError if the data directory cannot be used."""
        self.config = config
        self._store = JobStore(claim.data)
        self._jobs: dict[str, ServedJob] = {}
        self._by_request_id: dict[tuple[str, str], str] = {}  # by tenant and request_id
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ticker: asyncio.Task[None] | None = None
        self._work = asyncio.Event()  # set when there may be new lines to lease; a new one takes its place
        self._asked_s: dict[str, float] = {}  # by model: when an agent last asked for lines
        self.fleet = Fleet()
        self.counts = ServiceCounts()
        self._house = House(config.leases, self._announce_work, self.counts, config.traces, claim.check)
        self._dispatcher = Dispatcher(lambda tenant: config.limits.of(tenant).weight)
        self._rate = CallRate()
        self._storing = asyncio.Lock()  # jobs come into being and go one at a time
        self.shelved: Shelved = lambda _tenant: {}
        self.unreadable: list[str] = []
        """Jobs that were found on disk and could not be understood, a sentence each: they are left as they are."""

    async def start(self) -> None:
        """Loads all jobs and goes on with those that have not ended."""
        loaded = await asyncio.to_thread(self._store.load)
        self.unreadable = loaded.unreadable
        for sentence in loaded.unreadable:
            log.error("a job is left out: %s", sentence)
        for spec in loaded.specs:
            job = self._serve(spec)
            if spec.id in loaded.mended:
                job.mended(["the job's spec was damaged and was taken from its copy"])
        self._ticker = asyncio.create_task(self._tick_forever(), name="spillway-ticker")

    async def stop(self) -> None:
        """Ends all tasks and lets go of all files. Nothing is lost; the next start goes on from there.

        Raises StorageError if results of the last moments could not be kept.
        """
        for job in self._jobs.values():
            job.hurry()
            job.touch()
        tasks = [task for task in (self._ticker, *self._tasks.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        closings = (asyncio.to_thread(job.close) for job in self._jobs.values() if not job.state.final)
        failures = [each for each in await asyncio.gather(*closings, return_exceptions=True) if each is not None]
        if failures:
            raise failures[0]

    # jobs

    def upload(self) -> Upload:
        """Begins an upload; to be closed, whatever comes of it."""
        return self._store.upload(self.config.max_input_bytes)

    def link(self, content: StoredInput) -> LinkedInput:
        """Begins a job from content that is in the data directory already; to be closed, whatever comes of it.

        Raises NotFoundError, ResourceError.
        """
        return self._store.link(content)

    async def unlinked(self, sha256: str) -> None:
        """Content outside of jobs was removed: what only a job that is gone shared with it goes, too."""
        async with self._storing:
            self._store.release(sha256)

    async def submit(
        self, tenant: str, request: JobRequest, upload: Upload | LinkedInput, traceparent: str = ""
    ) -> ServedJob:
        """Makes a job of an upload or a link, or finds the one that an earlier attempt made of the same.

        `traceparent`: of the call (W3C trace context), if it had one.

        Raises InvalidError, AlreadyExistsError if the request_id was used for something else, ResourceError if a quota
        of the tenant or the disk is full.
        """
        request.check()
        await asyncio.to_thread(upload.finish)
        trace = begin_trace(self.config.traces, traceparent)
        spec = JobSpec(
            upload.id, request, upload.sha256, upload.size_bytes, upload.num_lines, time.time(), tenant, trace=trace
        )
        async with self._storing:
            known = self._by_request_id.get((tenant, request.request_id)) if request.request_id else None
            if known is not None:
                return self._same(self._jobs[known], spec)
            held = await self.holdings(tenant)
            new = Usage(1, spec.input_lines, held.more(spec.input_sha256, spec.input_bytes))
            self.config.limits.of(tenant).check(held.usage(), new)
            await to_the_end(self._store.adopt, upload, spec)
            self.counts.jobs_submitted += 1
            self.counts.input_bytes += spec.input_bytes
            job = self._serve(spec)
            job.trace.submitted(spec)
            return job

    async def fetch(self, uri: str, upload: Upload) -> None:
        """Fills an upload from elsewhere. Raises as InputSources.fetch."""
        stopped = threading.Event()
        await to_the_end(self.config.sources.fetch, uri, upload, stopped, on_cancel=stopped.set)

    def admit(self, tenant: str) -> None:
        """Counts a call of a client. Raises ResourceError if the tenant calls too often."""
        self._rate.spend(tenant, self.config.limits.of(tenant).calls_per_second, time.monotonic())

    async def holdings(self, tenant: str) -> Holdings:
        """What counts against the tenant's quotas."""
        counted = self.config.limits.of(tenant).input_bytes is not None
        contents = await asyncio.to_thread(self.shelved, tenant) if counted else {}
        specs = [job.spec for job in self._jobs.values() if job.spec.tenant == tenant]
        running = [spec for spec in specs if spec.outcome is None]
        contents |= {spec.input_sha256: spec.input_bytes for spec in specs}
        return Holdings(len(running), sum(each.input_lines for each in running), contents)

    async def check_room(self, tenant: str, upload: Upload, stated: Usage, *, counts_lines: bool) -> None:
        """Refuses an input that a quota has no room for: at once where its size is stated, else while it comes in.

        Until all of it is there nobody knows whether the tenant has it already. Raises ResourceError.
        """
        limits, used = self.config.limits.of(tenant), (await self.holdings(tenant)).usage()
        limits.check(used, stated)

        def check() -> None:
            lines = upload.num_lines if counts_lines else 0
            limits.check(used, Usage(stated.jobs, lines, upload.size_bytes))

        upload.check = check

    async def share(self, upload: Upload) -> None:
        """Makes a finished upload one with an equal input that is there. Raises ResourceError."""
        async with self._storing:
            await to_the_end(self._store.share, upload)

    def get(self, job_id: str, tenant: str | None = None) -> ServedJob:
        """A job of a tenant; of any if it is None. Raises NotFoundError: another tenant's job does not exist."""
        job = self._jobs.get(job_id)
        if job is None or tenant not in (None, job.spec.tenant):
            raise NotFoundError(Reason.JOB_NOT_FOUND, f"there is no job {job_id[:100]}")
        return job

    def named(self, tenant: str, request_id: str) -> ServedJob | None:
        """The job that an earlier attempt under this request_id made."""
        job_id = self._by_request_id.get((tenant, request_id))
        return None if job_id is None else self._jobs[job_id]

    def jobs(self, tenant: str | None = None) -> list[ServedJob]:
        """All jobs of a tenant, or of all tenants, in no order."""
        return [job for job in self._jobs.values() if tenant in (None, job.spec.tenant)]

    def page(self, tenant: str, size: int, before: str) -> tuple[list[ServedJob], str]:
        """A tenant's jobs, newest first, older than the id `before` (empty: all); and `before` of the next page."""
        mine = (job_id for job_id, job in self._jobs.items() if job.spec.tenant == tenant)
        ids = sorted((job_id for job_id in mine if not before or job_id < before), reverse=True)
        return [self._jobs[job_id] for job_id in ids[:size]], ids[size - 1] if len(ids) > size else ""

    def wish(self, tenant: str, job_id: str, wish: Wish) -> ServedJob:
        """Cancels, pauses or resumes. Cancelling what is cancelled or over is no error."""
        job = self.get(job_id, tenant)
        if not (wish is Wish.CANCEL and (job.state.final or job.state is State.FINALIZING)):
            job.wish(wish)
        return job

    async def delete(self, tenant: str, job_id: str) -> None:
        """Removes a job that has ended. Raises NotFoundError, ConflictError."""
        job = self.get(job_id, tenant)
        if not job.state.final:
            raise ConflictError(Reason.JOB_NOT_FINAL, f"job {job_id} is {job.state.name.lower()}", "Cancel it first.")
        await self._remove(job)

    def waiting_reason(self, job: ServedJob) -> str:
        """One sentence on why nothing of a job runs; empty if something does."""
        if job.trouble:
            return job.trouble
        if job.state in _WAITING:
            return _WAITING[job.state]
        if job.state is not State.RUNNING or job.num_leased:
            return ""
        model = job.spec.request.model
        if time.monotonic() - self._asked_s.get(model, -1e9) > AGENT_SILENCE_S:
            return f"no agent has asked for lines of model {model!r} for {AGENT_SILENCE_S:.0f} s"
        return f"the agents that serve model {model!r} are busy with other lines"

    # lines

    async def lease(self, worker: str, model: str, max_lines: int, wait_s: float) -> Grant | None:
        """Lines for a worker; waits up to `wait_s` for some. Raises InvalidError."""
        if not 1 <= max_lines <= MAX_LEASE_LINES:
            raise InvalidError(f"max_lines must lie in [1, {MAX_LEASE_LINES}]")
        deadline_s = time.monotonic() + wait_s
        while True:
            self._asked_s[model] = time.monotonic()
            grant = self._grant(worker, model, max_lines)
            if grant is not None:
                self.counts.leases_granted += 1
                self.counts.lines_leased += len(grant.lines)
            left_s = deadline_s - time.monotonic()
            if grant is not None or left_s <= 0:
                return grant
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._work.wait(), min(left_s, AGENT_SILENCE_S / 2))

    def renew(self, lease_ids: list[str]) -> list[str]:
        """Renews leases; returns those that are lost."""
        now_s = time.monotonic()
        held = ((lease, self._of_lease(lease)) for lease in lease_ids)
        return [lease for lease, job in held if job is None or not job.renew(lease, now_s)]

    def complete(self, job_id: str, results: list[tuple[int, bytes]], report: Report) -> int:
        """Keeps results; returns how many were new. Raises NotFoundError and as ServedJob.complete."""
        job = self.get(job_id)
        before = job.tokens().completion_tokens
        accepted = job.complete(results, report)
        self.counts.lines_completed += accepted
        if accepted:
            self._dispatcher.charge(job, job.tokens().completion_tokens - before)
        return accepted

    def fail(self, job_id: str, lease_id: str, failures: list[tuple[int, LineError, bool]]) -> int:
        """Notes failures (line, error, whether to try again); returns how many counted. Raises as `complete`."""
        job = self.get(job_id)
        before = job.counts().failed
        counted = sum(job.fail(lease_id, error, index, retryable=retryable) for index, error, retryable in failures)
        self.counts.lines_failed += job.counts().failed - before
        return counted

    def give_back(self, lease_ids: list[str]) -> None:
        """Takes back lines unfinished."""
        for lease_id in lease_ids:
            if (job := self._of_lease(lease_id)) is not None:
                job.give_back(lease_id)

    def _serve(self, spec: JobSpec) -> ServedJob:
        folder = self._store.folder(spec.id)
        job = ServedJob(spec, folder, self._house)
        self._jobs[spec.id] = job
        if spec.request.request_id:
            self._by_request_id[spec.tenant, spec.request.request_id] = spec.id
        if spec.outcome is None:
            task = asyncio.create_task(job.live(), name=f"spillway-job-{spec.id}")
            self._tasks[spec.id] = task
            task.add_done_callback(lambda task: self._lived(job, task))
        return job

    def _lived(self, job: ServedJob, task: asyncio.Task[None]) -> None:
        self._tasks.pop(job.spec.id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("job %s stopped by a defect of the gateway", job.spec.id, exc_info=error)
            job.trouble = f"a defect of the gateway stopped the job: {error!r}; it goes on after a restart"
            job.touch()

    def _same(self, job: ServedJob, spec: JobSpec) -> ServedJob:
        if (job.spec.request, job.spec.input_sha256) != (spec.request, spec.input_sha256):
            raise AlreadyExistsError(
                Reason.REQUEST_ID_REUSED,
                f"request_id was used for job {job.spec.id}, which has another input or other options",
                "Use a new request_id for a new job.",
            )
        return job

    def _live(self) -> list[ServedJob]:
        return [self._jobs[job_id] for job_id in self._tasks if job_id in self._jobs]

    def _of_lease(self, lease_id: str) -> ServedJob | None:
        """The job that a lease was given for: its id begins with the job's."""
        return self._jobs.get(lease_id.partition("-")[0])

    def _grant(self, worker: str, model: str, max_lines: int) -> Grant | None:
        jobs = [job for job in self._live() if job.spec.request.model == model and job.has_lines]
        return self._dispatcher.grant(jobs, worker, model, max_lines)

    async def _remove(self, job: ServedJob) -> None:
        async with self._storing:
            if self._jobs.pop(job.spec.id, None) is None:
                return  # somebody else was faster
            self._by_request_id.pop((job.spec.tenant, job.spec.request.request_id), None)
            job.touch()
            await to_the_end(self._store.delete, job.spec.id, job.spec.input_sha256)

    def _announce_work(self) -> None:
        self._work.set()
        self._work = asyncio.Event()

    async def _tick_forever(self) -> None:
        swept_s = float("-inf")
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            self.fleet.tick(now_s)
            for job in self._live():
                job.tick(now_s)
            if now_s - swept_s > SWEEP_S:
                swept_s = now_s
                self._dispatcher.forget_workers(now_s)
                self._asked_s = {model: at_s for model, at_s in self._asked_s.items() if now_s - at_s < AGENT_SILENCE_S}
                await self._retire()

    async def _retire(self) -> None:
        """Removes jobs that ended longer ago than they are kept, and files of jobs that are kept for less."""
        for job in self._jobs.values():
            with contextlib.suppress(ResourceError):  # the disk: the next sweep tries again
                job.expire_files(time.time())
        if self.config.retention_s is None:
            return
        limit_s = time.time() - self.config.retention_s
        ended = [
            job for job in self._jobs.values() if job.spec.outcome is not None and job.spec.outcome.end_s < limit_s
        ]
        for job in ended:
            log.info("job %s ended long enough ago and is removed", job.spec.id)
            await self._remove(job)
