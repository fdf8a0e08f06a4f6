"""Whose lines go out next: fair shares among tenants, priority within one, and lines that begin alike together.

An agent has in its cache what it ran last. So among the jobs whose turn it is, it gets lines of the one that shares the
longest beginning with the last line it was given; and where several jobs have lines of one document, a lease ends with
the document, so that the next lease can bring the other jobs' lines of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from spillway.gateway.families import Span
from spillway.gateway.job import RequestLine
from spillway.gateway.service.fair import FairShare
from spillway.gateway.service.leases import Lease
from spillway.gateway.service.served import ServedJob

MATCHED_JOBS = 32
"""So many jobs of one tenant and priority, the oldest, are searched for lines that begin alike."""
BYTES_PER_TOKEN = 4
"""What a request is charged when it goes out; its answer is charged by the count that comes with it."""
TRAIL_S = 600.0


@dataclass(frozen=True, slots=True)
class Grant:
    """Leased lines of one job, in prefix order, each with the number of its attempt (from 1)."""

    job_id: str
    lease: Lease
    lines: list[tuple[RequestLine, int]]


@dataclass(frozen=True, slots=True)
class _Trail:
    """The last line that a worker was given: what its prompt begins with, at each level it reaches."""

    keys: Sequence[int]
    given_s: float


class Dispatcher:
    """Chooses lines; `weight` says what share of the agents a tenant has."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._shares: dict[str, FairShare] = {}  # by model: each has agents of its own
        self._trails: dict[str, _Trail] = {}  # by worker

    def grant(self, jobs: Sequence[ServedJob], worker: str, model: str, max_lines: int) -> Grant | None:
        """Lines of one of the jobs, which are those of the model that may run; None if there are none to lease."""
        if not jobs:
            return None
        by_tenant: dict[str, list[ServedJob]] = {}
        for job in jobs:
            by_tenant.setdefault(job.spec.tenant, []).append(job)
        shares = self._shares.setdefault(model, FairShare())
        for tenant in shares.order({tenant: self._weight(tenant) for tenant in by_tenant}):
            for job, span in self._choices(by_tenant[tenant], worker):
                taken = job.take(worker, max_lines, time.monotonic(), span)
                if taken is not None:
                    lease, lines = taken
                    self._trails[worker] = _Trail(job.keys(lines[-1][0].index), time.monotonic())
                    size = sum(len(line.raw) for line, _ in lines)
                    self.charge(job, size / BYTES_PER_TOKEN)
                    return Grant(job.spec.id, lease, lines)
        return None

    def charge(self, job: ServedJob, tokens: float) -> None:
        """The job's tenant used so many tokens."""
        shares = self._shares.get(job.spec.request.model)
        if shares is not None:
            shares.charge(job.spec.tenant, tokens, self._weight(job.spec.tenant))

    def forget_workers(self, now_s: float) -> None:
        """Drops what is known of workers that have not asked for long."""
        self._trails = {name: trail for name, trail in self._trails.items() if now_s - trail.given_s < TRAIL_S}

    def _choices(self, jobs: list[ServedJob], worker: str) -> Iterator[tuple[ServedJob, Span | None]]:
        """Jobs of one tenant to take lines from, the best first, each with the part of its order to take, if any."""
        jobs = sorted(jobs, key=lambda job: (-job.spec.request.priority, job.spec.id))
        for _, group in groupby(jobs, key=lambda job: job.spec.request.priority):
            equals = list(group)
            matched = equals[:MATCHED_JOBS] if len(equals) > 1 else []
            trail = self._trails.get(worker)
            if trail is not None:
                yield from _alike(matched, trail.keys)
            for job in equals:
                yield job, _up_to_the_end_of_a_shared_document(job, matched)


def _alike(jobs: list[ServedJob], keys: Sequence[int]) -> Iterator[tuple[ServedJob, Span]]:
    """Where jobs have lines that begin with what the keys stand for, the longest beginning first."""
    for level in reversed(range(len(keys))):
        for job in jobs:
            span = job.family(level, keys[level])
            if span is not None:
                yield job, span


def _up_to_the_end_of_a_shared_document(job: ServedJob, others: list[ServedJob]) -> Span | None:
    """The part of the order of `job` that begins like its next line, if another job has lines that do, too."""
    keys = job.next_keys() if len(others) > 1 else ()
    for level in reversed(range(len(keys))):
        if any(other is not job and other.family(level, keys[level]) is not None for other in others):
            return job.family(level, keys[level])
    return None
