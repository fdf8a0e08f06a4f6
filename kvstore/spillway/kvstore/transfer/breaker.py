"""A breaker per tier: after repeated trouble the tier is not asked for a while, then probed by one request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum


class BreakerState(StrEnum):
    """``open``: requests are turned away. ``probing``: one request is under way that decides."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """Opens after ``threshold`` failures in a row; stays open for a pause that doubles up to ``longest_pause_s``.

    A failure is an I/O error or a missed deadline, not a miss. Thread-safe.
    """

    def __init__(
        self,
        threshold: int = 3,
        first_pause_s: float = 1.0,
        longest_pause_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold = threshold
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = first_pause_s
        self._open_until: float | None = None
        self._probe_started: float | None = None
        self.trips = 0

    @property
    def state(self) -> BreakerState:
        """The state now."""
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._probe_started is None else BreakerState.PROBING

    @property
    def available(self) -> bool:
        """Whether `allow` would say yes now."""
        until = self._open_until
        return until is None or self._may_probe(until, self._clock())

    def allow(self) -> bool:
        """Whether to send a request. After the pause one caller is told yes, and its outcome decides.

        A probe that never reports is replaced by another after a further pause.
        """
        if self._open_until is None:
            return True
        with self._lock:
            if self._open_until is None:
                return True
            now = self._clock()
            if not self._may_probe(self._open_until, now):
                return False
            self._probe_started = now
            return True

    def _may_probe(self, open_until: float, now: float) -> bool:
        started = self._probe_started
        return now >= open_until and (started is None or now >= started + self._pause_s)

    def success(self) -> None:
        """A request came back in time."""
        if self._failures == 0 and self._open_until is None:
            return
        with self._lock:
            self._failures = 0
            self._pause_s = self._first_pause_s
            self._open_until = self._probe_started = None

    def failure(self) -> None:
        """A request failed or missed its deadline."""
        with self._lock:
            self._failures += 1
            if self._open_until is not None:
                if self._probe_started is not None:
                    self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
                    self._open_until = self._clock() + self._pause_s
                    self._probe_started = None
            elif self._failures >= self._threshold:
                self.trips += 1
                self._open_until = self._clock() + self._pause_s
