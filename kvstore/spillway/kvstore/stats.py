"""What the store counts, and the snapshot of it that callers see."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from .index.base import IndexStats

_BUCKETS = 28


@dataclass(frozen=True, slots=True)
class Latencies:
    """A histogram: ``counts[i]`` operations took less than 2**i microseconds (and not less than half of that)."""

    counts: tuple[int, ...] = (0,) * _BUCKETS
    total_s: float = 0.0

    @property
    def operations(self) -> int:
        """How many operations were timed."""
        return sum(self.counts)

    def quantile_s(self, share: float) -> float:
        """The time that ``share`` of the operations stayed under, rounded up to a power of two; 0 if none."""
        target = share * self.operations
        seen = 0
        for power, count in enumerate(self.counts):
            seen += count
            if seen >= target and seen:
                return float(1 << power) * 1e-6
        return 0.0


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier. Counts are since the store was opened; ``blocks`` and the byte figures are of now.

    ``bytes``: memory or file bytes allocated, metadata included. ``foreign_blocks``: of another identity, never served.
    ``lost_slots``: given up after an I/O error. ``damaged``: headers and files found damaged when the store was opened.
    ``hits``: blocks delivered to a caller, verified. ``misses``: blocks a caller asked for and this tier could not
    deliver, by reason. ``verify_failures``: loads, prefetches included, where bytes or header were not what was asked
    for. ``stores``: blocks taken in, ``stored_bytes`` in the tier's form. ``drops``: blocks not taken in, or given up
    before this tier had them, by reason. ``loaded_bytes``: of hits, as delivered.
    """

    blocks: int
    bytes: int
    budget_bytes: int
    foreign_blocks: int
    lost_slots: int
    damaged: int
    hits: int
    misses: dict[str, int]
    verify_failures: int
    stores: int
    drops: dict[str, int]
    evictions: int
    foreign_evictions: int
    loaded_bytes: int
    stored_bytes: int
    load_latency: Latencies
    store_latency: Latencies
    breaker: str
    breaker_trips: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The whole store. ``misses``: blocks that no tier delivered. ``prefetches``: blocks, by what came of them.
    ``served``: what the block server did for peers, by outcome; empty where there is none. ``index``: the shared one's.

    Under a plan: ``spared`` blocks left the device without a copy, since nobody will read them again. ``prefetch_hits``
    were brought to host memory ahead of need and then delivered; ``late_loads`` came from below it while a line waited.
    """

    tiers: dict[str, TierStats]
    puts: int
    put_drops: int
    gets: int
    hits: int
    misses: int
    prefetches: dict[str, int]
    queued_writes: int
    queued_reads: int
    served: dict[str, int] = field(default_factory=dict)
    index: IndexStats | None = None
    spared: int = 0
    prefetch_hits: int = 0
    late_loads: int = 0


@dataclass(slots=True)
class TierCounters:
    """The counters behind `TierStats`. Thread-safe."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    hits: int = 0
    stores: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    verify_failures: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)
    _loads: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    _stores: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    _load_s: float = 0.0
    _store_s: float = 0.0

    def hit(self, length: int, seconds: float) -> None:
        """A verified block of ``length`` bytes was delivered in ``seconds``."""
        with self._lock:
            self.hits += 1
            self.loaded_bytes += length
            self._loads[_bucket(seconds)] += 1
            self._load_s += seconds

    def miss(self, reason: str) -> None:
        """A load gave no block."""
        with self._lock:
            self.misses[reason] += 1

    def unverified(self) -> None:
        """A loaded block was not what was asked for."""
        with self._lock:
            self.verify_failures += 1

    def stored(self, length: int, seconds: float) -> None:
        """A block of ``length`` bytes was taken in, in ``seconds``."""
        with self._lock:
            self.stores += 1
            self.stored_bytes += length
            self._stores[_bucket(seconds)] += 1
            self._store_s += seconds

    def drop(self, reason: str) -> None:
        """A block was not taken in, or given up."""
        with self._lock:
            self.drops[reason] += 1

    def latencies(self) -> tuple[Latencies, Latencies]:
        """Load and store latencies so far."""
        with self._lock:
            return Latencies(tuple(self._loads), self._load_s), Latencies(tuple(self._stores), self._store_s)


def _bucket(seconds: float) -> int:
    return min(_BUCKETS - 1, int(seconds * 1e6).bit_length())
