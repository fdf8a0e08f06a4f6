"""Timed claims on the lines of one job. Pure bookkeeping: no clock, no I/O; whoever calls says what time it is.

Lines are handed out in the job's own order, in runs of neighbours, so that an agent gets lines that share a prefix.
Lines that come back go first. A line that fails or whose lease runs out too often is given up, with its history.
"""

from __future__ import annotations

import heapq
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from spillway.gateway.families import Span

_LOOK = 4096  # places looked at in one go


@dataclass(frozen=True, slots=True)
class LeaseRules:
    """How long a claim on lines lasts, and how often a line is tried."""

    ttl_s: float = 60.0
    max_attempts: int = 3


class LeaseEnd(StrEnum):
    """What became of the last line of a lease."""

    DONE = "done"
    FAILED = "failed"
    EXPIRED = "expired"
    RETURNED = "returned"


@dataclass(slots=True)
class Lease:
    """A claim of one worker, lost once `expires_s` has passed.

    `lines` are those not finished yet, in order, each with its place in the order of the whole job.
    """

    id: str
    worker: str
    expires_s: float
    lines: dict[int, int] = field(default_factory=dict)
    traceparent: str = ""
    """Of its span, for the worker; empty if nobody traces it."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A line that used up its attempts; `history` says what became of each."""

    index: int
    history: tuple[str, ...]


class Lines(Protocol):
    """What a lease book needs of a job."""

    @property
    def order(self) -> npt.NDArray[np.uint32]:
        """Lines that may run, in the order in which they should; some may be done. `[n] uint32`."""

    def undone_places(self) -> npt.NDArray[np.bool_]:
        """By place in the order: whether that line has no result yet. `[n] bool`, a copy."""

    def is_done(self, index: int) -> bool:
        """Whether a line has a result."""


class LeaseBook:
    """Who works on what. `finished` is to be told of every line that is done, once the job knows of it."""

    def __init__(
        self,
        job: Lines,
        rules: LeaseRules,
        name: str = "",
        on_over: Callable[[Lease, LeaseEnd], None] = lambda _lease, _end: None,
    ) -> None:
        """The ids of its leases begin with `name` and a dash. `on_over` is told of each that holds no line any more."""
        self._name, self._on_over = name, on_over
        self._order, self._is_done = job.order, job.is_done
        self._free = job.undone_places()  # by place: may still be handed out, unless it was done meanwhile
        self._cursor = 0  # no place before it is free, but for those that came back
        self._ttl_s, self._max_attempts = rules.ttl_s, rules.max_attempts
        self._returned: list[tuple[int, int]] = []  # heap of (place in the order, line)
        self._leases: dict[str, Lease] = {}
        self._holder: dict[int, str] = {}  # by line: the lease that has it
        self._history: dict[int, list[str]] = {}

    @property
    def num_leased(self) -> int:
        """Lines that somebody works on."""
        return len(self._holder)

    @property
    def num_leases(self) -> int:
        """Leases that hold lines."""
        return len(self._leases)

    @property
    def has_free(self) -> bool:
        """Whether there may be lines to lease: if not, there are none."""
        return bool(self._returned) or self._cursor < len(self._order)

    def free_in(self, span: Span) -> bool:
        """Whether there may be lines to lease in a part of the order."""
        return bool(self._free[span[0] : span[1]].any())

    def head(self) -> int | None:
        """Place of the line that `take` would begin with; None if there is none."""
        while self._returned and not self._is_free(self._returned[0][0]):
            heapq.heappop(self._returned)
        if self._returned:
            return self._returned[0][0]
        self._cursor = self._next_free(self._cursor, len(self._order))
        return self._cursor if self._cursor < len(self._order) else None

    def take(self, worker: str, max_lines: int, now_s: float, span: Span | None = None) -> Lease | None:
        """Leases up to `max_lines` lines, only of a part of the order if one is given; None if there are none."""
        places = self._from_span(span, max_lines) if span is not None else self._next(max_lines)
        if not places:
            return None
        lease = Lease(f"{self._name}-{secrets.token_hex(8)}", worker, now_s + self._ttl_s)
        self._leases[lease.id] = lease
        for place, index in places:
            lease.lines[index] = place
            self._holder[index] = lease.id
        return lease

    def attempt(self, index: int) -> int:
        """Number of the attempt that a line is in, from 1."""
        return len(self._history.get(index, ())) + 1

    def renew(self, lease_id: str, now_s: float) -> bool:
        """Keeps a lease alive. False if it is lost."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        lease.expires_s = now_s + self._ttl_s
        return True

    def holds(self, lease_id: str, index: int) -> bool:
        """Whether a line is with this lease."""
        return self._holder.get(index) == lease_id

    def finished(self, index: int) -> None:
        """The line is done, by whomever."""
        self._history.pop(index, None)
        holder = self._holder.pop(index, None)
        if holder is not None:
            self._drop(holder, index, LeaseEnd.DONE)

    def failed(self, lease_id: str, index: int, why: str) -> GivenUp | None:
        """The attempt under this lease came to nothing: the line goes back, or is given up and returned."""
        if not self.holds(lease_id, index):
            return None
        return self._back(index, f"{self._leases[lease_id].worker}: {why}", LeaseEnd.FAILED)

    def give_back(self, lease_id: str) -> None:
        """The worker returns what it has not finished; that counts as no attempt."""
        lease = self._leases.get(lease_id)
        for index in [] if lease is None else list(lease.lines):
            self._back(index, None, LeaseEnd.RETURNED)

    def expire(self, now_s: float) -> list[GivenUp]:
        """Takes back what leases past their time hold. Returns the lines that this was the last attempt of."""
        lost = [lease for lease in self._leases.values() if lease.expires_s < now_s]
        tried = [
            self._back(index, f"{lease.worker}: lease ran out", LeaseEnd.EXPIRED)
            for lease in lost
            for index in list(lease.lines)
        ]
        return [given_up for given_up in tried if given_up is not None]

    def revoke(self) -> None:
        """Ends all leases: their lines are not wanted any more."""
        for lease_id in list(self._leases):
            self.give_back(lease_id)

    def _next(self, max_lines: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while self._returned and len(found) < max_lines:
            place, index = heapq.heappop(self._returned)
            if self._is_free(place):
                self._free[place] = False
                found.append((place, index))
        if missing := max_lines - len(found):
            ahead = self._from_span((self._cursor, len(self._order)), missing)
            self._cursor = ahead[-1][0] + 1 if len(ahead) == missing else len(self._order)
            found += ahead
        return found

    def _from_span(self, span: Span, max_lines: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for start in range(*span, _LOOK):
            places = np.flatnonzero(self._free[start : min(start + _LOOK, span[1])]) + start
            for place, index in zip(places.tolist(), self._order[places].tolist(), strict=True):
                if len(found) == max_lines:
                    return found
                self._free[place] = False
                if not self._is_done(index):
                    found.append((place, index))
        return found

    def _next_free(self, place: int, stop: int) -> int:
        """The first place from `place` on that may be handed out, or `stop`."""
        while place < stop:
            ahead = self._free[place : min(place + _LOOK, stop)]
            step = int(ahead.argmax())
            place += step if ahead[step] else len(ahead)
            if place < stop and ahead[step]:
                if self._is_free(place):
                    return place
                place += 1
        return stop

    def _is_free(self, place: int) -> bool:
        if self._free[place] and self._is_done(int(self._order[place])):
            self._free[place] = False
        return bool(self._free[place])

    def _back(self, index: int, why: str | None, end: LeaseEnd) -> GivenUp | None:
        place = self._drop(self._holder.pop(index), index, end)
        history = self._history.setdefault(index, []) if why is not None else []
        if why is not None:
            history.append(why)
        if len(history) >= self._max_attempts:
            del self._history[index]
            return GivenUp(index, tuple(history))
        self._free[place] = True
        heapq.heappush(self._returned, (place, index))
        return None

    def _drop(self, lease_id: str, index: int, end: LeaseEnd) -> int:
        """Takes a line out of its lease; returns its place in the order."""
        lease = self._leases[lease_id]
        place = lease.lines.pop(index)
        if not lease.lines:
            del self._leases[lease_id]
            self._on_over(lease, end)
        return place
