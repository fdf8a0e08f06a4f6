"""Bringing blocks from lower tiers to host memory before they are asked for."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial

from ..buffers import Bytes
from ..header import BlockHeader
from ..identity import BlockHash
from ..outcomes import MissReason
from ..tiers.host import HostTier
from ..transfer.lane import Lane
from ..transfer.reads import Priority, ReadBatch, ReadQueue, ReadRequest
from .uses import NextUses

_LINES_AHEAD = 16
_HOST_SHARE = 4
"""At most one slot in this many of the host tier is promised to blocks that are on their way."""
_FIRST_DEADLINE_S = 2.0
_SHORTEST_DEADLINE_S = 0.05

Takes = Callable[[BlockHash], bool]
"""Whether host memory would take a block from below it now."""
Promote = Callable[[Lane, BlockHeader, Bytes], bool]
"""Offers a block fetched from a lane to host memory; whether it was taken."""


class Prefetcher:
    """Queues reads behind all urgent loads, each worth nothing after the moment its line begins.

    ``outcomes`` counts blocks: ``fetched``, ``late`` (the deadline passed first), ``cancelled`` (its line has begun),
    ``no_room`` (host memory holds only what is needed sooner), ``failed``. ``hits``: fetched ones that were then
    delivered from host memory.
    """

    def __init__(
        self, uses: NextUses, held: HostTier, readers: Sequence[ReadQueue], takes: Takes, promote: Promote
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self.hits = 0
        self._uses = uses
        self._held = held
        self._readers = readers
        self._takes = takes
        self._promote = promote
        self._lock = threading.Lock()
        self._under_way: set[BlockHash] = set()
        self._fetched: set[BlockHash] = set()
        self._slots = held.usage().total
        self._batches: deque[tuple[int, ReadBatch]] = deque()
        self._next_line = 0
        self._full = False
        self._line_s = 0.0
        self._moved_at: float | None = None

    def fetch(self, blocks: Sequence[BlockHash], deadline: float, line: int = -1) -> bool:
        """Queue those of ``blocks`` that only a lower tier holds; whether there was room for all of them.

        ``line``: the line whose beginning cancels them.
        """
        wanted, left = [block for block in blocks if self._is_wanted(block)], 0
        for reader in self._readers:
            if not wanted or not reader.lane.breaker.available:
                continue
            there = [block for block, held in zip(wanted, reader.holds(wanted), strict=True) if held]
            with self._lock:
                fresh = [block for block in there if block not in self._under_way]
                taken = fresh[: self._room]
                self._under_way.update(taken)
            left += len(fresh) - len(taken)
            if not taken:
                continue
            requests = [
                ReadRequest(block, partial(self._deliver, reader.lane), partial(self._ended, block)) for block in taken
            ]
            batch = reader.submit(requests, Priority.PREFETCH, deadline)
            if line >= 0:
                self._batches.append((line, batch))
            wanted = [block for block in wanted if block not in self._under_way]
        return left == 0

    def restart(self) -> None:
        """A new plan begins."""
        for _, batch in self._batches:
            batch.cancel()
        self._batches.clear()
        self._next_line = 0
        self._full = False
        self._line_s = 0.0
        self._moved_at = None

    def look_ahead(self, lines_begun: int) -> None:
        """The plan has moved on by ``lines_begun`` lines: let go of what is too late, queue what comes next.

        Stops at the first line whose blocks host memory would not take, until a further line has begun.
        """
        plan = self._uses.plan
        if plan is None:
            return
        position, now = plan.position, time.monotonic()
        if self._moved_at is None or lines_begun:
            self._measure(now, lines_begun)
        while self._batches and self._batches[0][0] < position:
            self._batches.popleft()[1].cancel()
        if self._full and not lines_begun:
            return
        for line in range(max(position, self._next_line), min(position + _LINES_AHEAD, plan.lines)):
            wanted = [block for block in plan.blocks_of(line) if self._is_wanted(block)]
            self._full = bool(wanted) and not self._takes(wanted[0])
            if self._full or self._room == 0:
                return
            ahead_s = (line - position + 1) * self._line_s if self._line_s else _FIRST_DEADLINE_S
            if not self.fetch(wanted, now + max(_SHORTEST_DEADLINE_S, ahead_s), line):
                return
            self._next_line = line + 1

    def delivered(self, blocks: Sequence[BlockHash]) -> None:
        """Host memory delivered ``blocks``."""
        with self._lock:
            self.hits += len(self._fetched.intersection(blocks))
            self._fetched.difference_update(blocks)

    @property
    def _room(self) -> int:
        """How many more blocks may be on their way."""
        return max(0, max(1, self._slots // _HOST_SHARE) - len(self._under_way))

    def _measure(self, now: float, lines_begun: int) -> None:
        if self._moved_at is not None:
            latest = (now - self._moved_at) / lines_begun
            self._line_s = latest if self._line_s == 0.0 else 0.8 * self._line_s + 0.2 * latest
        self._moved_at = now

    def _is_wanted(self, block: BlockHash) -> bool:
        return not (block in self._under_way or self._uses.on_device(block) or self._held.contains(block))

    def _deliver(self, lane: Lane, header: BlockHeader, stored: Bytes) -> MissReason | None:
        return None if self._promote(lane, header, stored) else MissReason.NO_ROOM

    def _ended(self, block: BlockHash, result: MissReason | None, seconds: float) -> None:  # noqa: ARG002 - others time it
        with self._lock:
            self._under_way.discard(block)
            self.outcomes[_OUTCOMES.get(result, "failed")] += 1
            if result is None:
                self._fetched.add(block)
                if len(self._fetched) > 2 * self._slots:  # the others have left host memory unused
                    self._fetched = {each for each in self._fetched if self._held.contains(each)}


_OUTCOMES = {
    None: "fetched",
    MissReason.DEADLINE: "late",
    MissReason.CANCELLED: "cancelled",
    MissReason.NO_ROOM: "no_room",
}
