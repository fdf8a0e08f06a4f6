"""What a run knows and how it is judged. Pure: contents that tell on themselves, counts, entries, findings."""

from __future__ import annotations

import functools
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import msgspec
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Figures = dict[str, float]
"""A worker's counters and gauges by name."""

RESTING = 0xA5
"""What a buffer is filled with while nobody may write into it."""
_PLACE = struct.Struct(">IIII")


@functools.cache
def _steps(words: int) -> npt.NDArray[np.uint64]:
    return np.arange(words, dtype=np.uint64)


def content(block: bytes, length: int) -> Bytes:
    """The one right content of ``block``, ``length`` bytes (a multiple of 8): every word depends on name and place."""
    first, second = np.frombuffer(block, dtype="<u8")[:2]
    return (_steps(length // 8) * (first | np.uint64(1)) + second).view(np.uint8)


class Counts(msgspec.Struct):
    """What came of operations on blocks. ``wrong``: delivered bytes that are not the block's. ``written_late``: bytes
    that came into a buffer after its call had returned. ``failures``: exceptions that no caller should see."""

    operations: int = 0
    hits: int = 0
    misses: int = 0
    kept: int = 0
    not_kept: int = 0
    matched: int = 0
    prefetched: int = 0
    dropped: int = 0
    wrong: int = 0
    written_late: int = 0
    slowest_get_s: float = 0.0
    slowest_put_s: float = 0.0
    failures: list[str] = []

    def add(self, other: Counts) -> None:
        """Take in ``other``."""
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, theirs) if name.startswith("slowest") else mine + theirs)


class Books:
    """Figures of all lives of all workers. A life's counters end with it; what it last told is kept."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], Figures] = {}

    def enter(self, worker: int, life: int, figures: Figures) -> None:
        """The latest figures of one life."""
        self._last[worker, life] = figures

    def total(self, pattern: str, worker: int | None = None) -> float:
        """Sum over all lives, of one worker or of all, of the figures whose name matches ``pattern``."""
        return sum(
            value
            for (number, _), figures in self._last.items()
            if worker in (None, number)
            for name, value in figures.items()
            if fnmatchcase(name, pattern)
        )

    def totals(self) -> Figures:
        """Sums over all lives of all workers, by name."""
        summed: Counter[str] = Counter()
        for figures in self._last.values():
            summed.update(figures)
        return dict(summed)


@dataclass(frozen=True)
class Lease:
    """A line of the index's table of leases."""

    node: str
    generation: int


@dataclass(frozen=True)
class SharedIndex:
    """All of an index in Redis. ``entries``: block → its places, 16 bytes each: node number, generation,
    tier bits, segment."""

    leases: Mapping[int, Lease]
    entries: Mapping[bytes, bytes]

    def places(self) -> Iterable[tuple[bytes, int, int, int]]:
        """Block, node number, generation, tiers as bits."""
        for block, packed in self.entries.items():
            for number, generation, bits, _ in _PLACE.iter_unpack(packed):
                yield block, number, generation, bits


def stray_entries(index: SharedIndex, living: Mapping[str, Mapping[bytes, int]]) -> list[str]:
    """How ``index`` differs from what ``living`` nodes hold (node → block → tiers as bits). Empty: no leak, no gap."""
    found: Counter[str] = Counter()
    entered: dict[str, dict[bytes, int]] = {node: {} for node in living}
    for block, number, generation, bits in index.places():
        lease = index.leases.get(number)
        if lease is None or lease.node not in living:
            found[f"entries of the dead node {lease.node if lease else number}"] += 1
        elif generation != lease.generation:
            found[f"entries of an older generation of {lease.node}"] += 1
        else:
            entered[lease.node][block] = bits
    for node, held in living.items():
        for block in held.keys() | entered[node].keys():
            if held.get(block, 0) != entered[node].get(block, 0):
                found[f"entries that differ from what {node} holds"] += 1
    return [f"index: {count} {what}" for what, count in sorted(found.items())]


@dataclass
class Strike:
    """A fault that struck. ``evidence``: patterns of figures of which one must grow; ``before``: their sum until then.

    ``certain``: whether every strike must show; else one of several of the kind must (a flipped bit in a slot that is
    written next is harmless).
    """

    kind: str
    worker: int | None
    round: int
    evidence: Sequence[str] = ()
    anywhere: bool = False
    certain: bool = True
    before: float = 0.0
    after: float = 0.0

    def sum(self, books: Books) -> float:
        """Of the figures that show it."""
        worker = None if self.anywhere else self.worker
        return sum(books.total(pattern, worker) for pattern in self.evidence)

    @property
    def seen(self) -> bool:
        """Whether a figure shows it."""
        return self.after > self.before


@dataclass
class Findings:
    """All that a run may be blamed for, in words; empty is a pass."""

    counts: Counts = field(default_factory=Counts)
    strikes: list[Strike] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)

    def violations(self) -> list[str]:
        """The judgement."""
        blamed = [*self.leaks, *self.defects, *self.counts.failures]
        if self.counts.wrong:
            blamed.append(f"{self.counts.wrong} blocks were delivered with wrong bytes")
        if self.counts.written_late:
            blamed.append(f"{self.counts.written_late} buffers were written after their call had returned")
        return list(dict.fromkeys(blamed + self._unseen()))

    def _unseen(self) -> list[str]:
        kinds: dict[str, list[Strike]] = {}
        for strike in self.strikes:
            if strike.evidence:
                kinds.setdefault(strike.kind, []).append(strike)
        unseen = []
        for kind, strikes in kinds.items():
            silent = [strike for strike in strikes if not strike.seen]
            if silent and (strikes[0].certain or len(silent) == len(strikes) > 1):
                rounds = ", ".join(str(strike.round) for strike in silent)
                unseen.append(f"no metric showed {kind} in round {rounds}: {', '.join(strikes[0].evidence)}")
        return unseen
