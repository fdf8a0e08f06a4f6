"""Deletes what the dead left in Redis, a little at a time, by one node at a time."""

from __future__ import annotations

import time
from collections import Counter

from .redis_client import RedisCalls, RedisConfig
from .redis_scripts import CLEAN, CLEANER, END, FORGET, Keys

_BUCKETS = 16
"""Buckets cleaned per turn, a call each: some 1,000 entries of a million."""
_PAUSE_S = 0.02
_BUSY_S = 1.0
"""How long another node is left to clean before it is looked at again; also how long one that dies keeps the task."""
_FORGET_S = 3600.0


class Cleaner:
    """Entries of dead nodes, and of this node's own older generations. For one thread.

    A node counts as dead once its lease ended; should it come back, it has a new generation and enters all anew. All of
    that is invisible to look-ups already, so there is no hurry: short calls with pauses between, so that no look-up
    waits behind a long one, and no more of them however many nodes there are.
    """

    def __init__(self, config: RedisConfig, keys: Keys, calls: RedisCalls, counts: Counter[str]) -> None:
        """``counts``: gets ``cleaned`` (entries) and ``forgotten`` (nodes)."""
        self._config = config
        self._keys = keys
        self._calls = calls
        self._counts = counts
        self._cursor = 0
        self._scanned: list[int] = []
        self._own_is_clean = False
        self._ahead: dict[int, tuple[bytes, float]] = {}

    def begin(self, generation: int) -> None:
        """This node has a new lease. Redis may have gone back in time, so that even its number was there before."""
        self._own_is_clean = generation == 1  # the first of a name has none before it
        self._cursor, self._scanned = 0, []

    def turn(self, number: int, generation: int) -> float:
        """Clean a few buckets for the node with this lease; how many seconds until the next turn."""
        if not self._calls.script(CLEANER, [self._keys.of("cleaner")], [number, int(_BUSY_S * 1000)]):
            return _BUSY_S
        if not self._own_is_clean:
            self._clean_own(number, generation)
            return _PAUSE_S
        for dead, its_generation in self._dead(number):
            buckets = self._calls.command("SRANDMEMBER", self._keys.of("r", dead), _BUCKETS)
            if buckets is None:
                break
            if buckets:
                self._clean(dead, its_generation, [int(bucket) for bucket in buckets], dead=True)
                return _PAUSE_S
            self._forget(dead)
        return self._config.lease_s

    def _dead(self, own: int) -> list[tuple[int, int]]:
        """Number and last generation of each node whose lease ended."""
        leases = self._calls.command("HGETALL", self._keys.of("leases"))
        clock = self._calls.command("EVAL", "return redis.call('TIME')", 1, self._keys.of("leases"))
        if not leases or not clock:
            return []
        now_ms = int(clock[0]) * 1000 + int(clock[1]) // 1000
        items = leases.items() if isinstance(leases, dict) else zip(leases[::2], leases[1::2], strict=True)
        dead, ahead = [], {}
        for number, lease in ((int(number), lease) for number, lease in items if int(number) != own):
            generation, ends_ms = (int(part) for part in lease.split(b"|", 2)[:2])
            length_ms = int(lease.rpartition(b"|")[2])
            if ends_ms <= now_ms:
                dead.append((number, generation))
            elif ends_ms > now_ms + 2 * length_ms:
                ahead[number] = self._end(number, lease, length_ms / 1000)
        self._ahead = ahead
        return dead

    def _end(self, number: int, lease: bytes, length_s: float) -> tuple[bytes, float]:
        """End a lease from before Redis's clock jumped back, once it is clear that its node does not renew it.

        The lease and when it was first seen, by this node's monotonic clock.
        """
        seen = self._ahead.get(number, (b"", 0.0))
        if seen[0] != lease:
            return lease, time.monotonic()
        if time.monotonic() - seen[1] >= length_s:
            self._calls.script(END, [self._keys.of("leases")], [number, lease])
        return seen

    def _clean_own(self, number: int, generation: int) -> None:
        """The reverse set stays, since living entries are in its buckets too: one pass over it by cursor."""
        if not self._scanned:
            answer = self._calls.command("SSCAN", self._keys.of("r", number), self._cursor, "COUNT", _BUCKETS)
            if answer is None:
                return
            self._cursor = int(answer[0])
            self._scanned = [int(bucket) for bucket in answer[1]]
        buckets, self._scanned = self._scanned[:_BUCKETS], self._scanned[_BUCKETS:]
        if not self._clean(number, generation, buckets, dead=False):
            self._cursor, self._scanned = 0, []
        elif not self._cursor and not self._scanned:
            self._own_is_clean = True

    def _clean(self, number: int, generation: int, buckets: list[int], *, dead: bool) -> bool:
        """False if Redis did not answer, or the node has another lease by now."""
        reverse = self._keys.of("r", number)
        for bucket in buckets:
            keys = [self._keys.of("leases"), reverse, self._keys.of("b", bucket)]
            removed = self._calls.script(CLEAN, keys, [number, generation, bucket, int(dead)])
            if removed is None or removed < 0:
                return False
            self._counts["cleaned"] += removed
        return True

    def _forget(self, number: int) -> None:
        parts = ("leases", "numbers", "generations", "writes", "about")
        keys = [self._keys.of(part) for part in parts] + [self._keys.of(part, number) for part in ("r", "s")]
        if self._calls.script(FORGET, keys, [number, int(_FORGET_S * 1000)]) == 1:
            self._counts["forgotten"] += 1
