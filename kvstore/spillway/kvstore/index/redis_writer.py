"""Keeps Redis told of what this node has: a lease, batches of changes, and the entries of the dead deleted."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from ..identity import BlockHash
from .memory import MemoryIndex
from .redis_cleaner import Cleaner
from .redis_client import RedisCalls, RedisConfig
from .redis_scripts import ACQUIRE, RELEASE, RENEW, SEGMENT_BLOCKS, WRITE, Keys

_log = logging.getLogger(__name__)

_BATCH = SEGMENT_BLOCKS
_PAUSE_S = 0.02
_GATHER_S = 0.002
"""How long changes are gathered before they are written."""


class Writer:
    """One thread. It holds blocks whose entry may differ, not changes: however often a block changed, it is written
    once, as it then is.

    What Redis has forgotten (a restart, a failover, a call without an answer) shows in the count of writes, which Redis
    keeps and every write compares. Then the node takes a new generation, so that whatever old entries there are become
    invisible, and enters all it has. So does one whose lease ran out while it was stopped.
    """

    def __init__(
        self, config: RedisConfig, keys: Keys, calls: RedisCalls, own: MemoryIndex, tiers: Sequence[str]
    ) -> None:
        self._config = config
        self._keys = keys
        self._calls = calls
        self._own = own
        self._tiers = tiers
        self._token = secrets.token_hex(8)
        self.counts: Counter[str] = Counter()
        self.number = self.generation = 0
        self._writes = 0
        self._held = False
        self._acquired_once = False
        self._segments = _Segments()
        self._cleaner = Cleaner(config, keys, calls, self.counts)
        self._dirty: dict[BlockHash, None] = {}
        self._overflowed = False
        self._writing = 0
        self._changed = threading.Condition()
        self._closing = False
        self._renew_at = self._clean_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"kv-index-{config.node}", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Blocks whose entry in Redis may differ from what is here."""
        return len(self._dirty) + self._writing

    @property
    def held(self) -> bool:
        """Whether this node holds its lease, as far as it knows."""
        return self._held

    def changed(self, blocks: Iterable[BlockHash]) -> None:
        """Have ``blocks`` written as they are by then. Does not wait."""
        with self._changed:
            if self._overflowed:
                self.counts["dropped"] += sum(1 for _ in blocks)
                return
            self._dirty.update(dict.fromkeys(blocks))
            if len(self._dirty) > self._config.most_changes:
                self.counts["dropped"] += len(self._dirty)
                self._dirty.clear()
                self._overflowed = True
                self._held = False
            self._changed.notify_all()

    def settle(self, deadline: float) -> bool:
        """Wait until Redis has it all; False at ``deadline`` (monotonic)."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._held and not self._dirty and not self._writing, max(0.0, deadline - time.monotonic())
            )

    def close(self) -> None:
        """Stop, and end the lease if Redis answers."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._held:
            self._calls.script(RELEASE, [self._keys.of("leases")], [self.number, self._token])

    def _run(self) -> None:
        while not self._closing:
            try:
                pause_s = self._turn()
            except Exception:  # noqa: BLE001 - a defect must cost a turn, not the thread that keeps the lease
                _log.exception("the Redis index failed in an unforeseen way")
                self.counts["internal"] += 1
                pause_s = 1.0
            with self._changed:
                if not self._closing and not (self._held and self._dirty):
                    self._changed.wait(pause_s)
                elif not self._closing:
                    self._changed.wait(_GATHER_S)

    def _turn(self) -> float:
        """Do what is due; how long until something else is, if nothing changes."""
        now = time.monotonic()
        if not self._held and not self._acquire():
            return _PAUSE_S * 5
        if now >= self._renew_at and not self._renew():
            return _PAUSE_S
        while self._held and self._dirty and not self._closing and time.monotonic() < self._renew_at:
            self._write_batch()
        if self._held and now >= self._clean_at:
            self._clean_at = now + self._cleaner.turn(self.number, self.generation)
        return max(0.0, min(self._renew_at, self._clean_at) - time.monotonic())

    def _acquire(self) -> bool:
        keys = [self._keys.of(part) for part in ("leases", "numbers", "generations", "writes", "about")]
        lease_ms = int(self._config.lease_s * 1000)
        about = f"{self._config.address}|{','.join(self._tiers)}"
        take_over = "0" if self._acquired_once else "1"
        says = self._config.about.pack()
        arguments = [self._config.node, self._token, lease_ms, about, take_over, says, self._keys.of("s", "")]
        answer = self._calls.script(ACQUIRE, keys, arguments)
        if answer is None:
            return False
        number, generation = int(answer[0]), int(answer[1])
        if generation == 0:
            self.counts["fenced"] += 1
            return False
        with self._changed:
            self.number, self.generation, self._writes = number, generation, 0
            self._cleaner.begin(generation)
            # What is here now is published whole; what changes meanwhile comes into the set too.
            self._overflowed = False
            self._segments.begin()
            self._dirty.update(dict.fromkeys(self._own.entered()))
            self.counts["resyncs" if self._acquired_once else "leases"] += 1
            self._held = self._acquired_once = True
            self._renew_at = time.monotonic() + self._config.lease_s / 3
            self._clean_at = 0.0
            self._changed.notify_all()
        return True

    def _renew(self) -> bool:
        keys = [self._keys.of("leases"), self._keys.of("writes")]
        lease_ms = int(self._config.lease_s * 1000)
        answer = self._calls.script(RENEW, keys, [self.number, self.generation, self._writes, self._token, lease_ms])
        if answer == 1:
            self._renew_at = time.monotonic() + self._config.lease_s / 3
            return True
        if answer is not None:
            self._lost()
        return False

    def _lost(self) -> None:
        with self._changed:
            self._held = False

    def _write_batch(self) -> None:
        with self._changed:
            # A put enters its last block first: turned round, so that segments have chains in their order.
            batch = list(islice(self._dirty, _BATCH))[::-1]
            for block in batch:
                del self._dirty[block]
            self._writing = len(batch)
        buckets = [self._keys.bucket(block) for block in batch]
        keys = [self._keys.of("leases"), self._keys.of("writes"), self._keys.of("r", self.number)]
        keys += [self._keys.of("s", self.number)]
        keys += [self._keys.of("b", bucket) for bucket in buckets]
        arguments: list[object] = [self.number, self.generation, self._writes, self._token]
        for block, bucket in zip(batch, buckets, strict=True):
            bits = self._bits(block)
            arguments += (block, bits, bucket, self._segments.take(bits))
        answer = self._calls.script(WRITE, keys, arguments)
        with self._changed:
            self._writing = 0
            if answer is None or answer < 0:
                self._held = False  # whether it was written is not known: begin anew
                self._dirty.update(dict.fromkeys(batch))
            else:
                self._writes = answer
                self.counts["written"] += len(batch)
            self._changed.notify_all()

    def _bits(self, block: BlockHash) -> int:
        held = self._own.tiers_of(block)
        return sum(1 << position for position, tier in enumerate(self._tiers) if tier in held)


class _Segments:
    """Which segment each newly entered block goes to: one after another, so that those of a chain are together."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """There are none yet."""
        self._taken: Counter[int] = Counter()

    def take(self, bits: int) -> int:
        """The segment for a block in the tiers ``bits``."""
        segment = self._taken[bits] // SEGMENT_BLOCKS
        self._taken[bits] += 1
        return segment
