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

Promote = Callable[[Lane, BlockHeader, Bytes], bool]
"""Offers a block fetched from a lane to host memory; whether it was taken."""


class Prefetcher:
    """Queues reads behind all urgent loads, each worth nothing after the moment its line begins.

    ``outcomes`` counts blocks: ``fetched``, ``late`` (the deadline passed first), ``cancelled`` (its line has begun),
    ``no_room`` (host memory holds only what is needed sooner), ``failed``.
    """

    def __init__(self, uses: NextUses, held: HostTier, readers: Sequence[ReadQueue], promote: Promote) -> None:
        self.outcomes: Counter[str] = Counter()
        self._uses = uses
        self._held = held
        self._readers = readers
        self._promote = promote
        self._lock = threading.Lock()
        self._under_way: set[BlockHash] = set()
        self._most = max(1, held.usage().total // _HOST_SHARE)
        self._batches: deque[tuple[int, ReadBatch]] = deque()
        self._next_line = 0
        self._line_s = 0.0
        self._moved_at: float | None = None

    def fetch(self, blocks: Sequence[BlockHash], deadline: float, line: int = -1) -> None:
        """Queue those of ``blocks`` that only a lower tier holds. ``line``: the line whose beginning cancels them."""
        for reader in self._readers:
            if not reader.lane.breaker.available:
                continue
            there = [block for block, held in zip(blocks, reader.holds(blocks), strict=True) if held]
            with self._lock:
                wanted = [block for block in there if self._is_wanted(block)]
                wanted = wanted[: self._most - len(self._under_way)]
                self._under_way.update(wanted)
            if not wanted:
                continue
            requests = [
                ReadRequest(block, partial(self._deliver, reader.lane), partial(self._ended, block)) for block in wanted
            ]
            batch = reader.submit(requests, Priority.PREFETCH, deadline)
            if line >= 0:
                self._batches.append((line, batch))

    def restart(self) -> None:
        """A new plan begins."""
        for _, batch in self._batches:
            batch.cancel()
        self._batches.clear()
        self._next_line = 0
        self._line_s = 0.0
        self._moved_at = None

    def look_ahead(self, lines_begun: int) -> None:
        """The plan has moved on by ``lines_begun`` lines: let go of what is too late, queue what comes next."""
        now = time.monotonic()
        if self._moved_at is not None and lines_begun:
            latest = (now - self._moved_at) / lines_begun
            self._line_s = latest if self._line_s == 0.0 else 0.8 * self._line_s + 0.2 * latest
        self._moved_at = now
        position = self._uses.position
        while self._batches and self._batches[0][0] < position:
            self._batches.popleft()[1].cancel()
        plan = self._uses.plan
        if plan is None:
            return
        last = min(position + _LINES_AHEAD, len(plan))
        for line in range(max(position, self._next_line), last):
            if len(self._under_way) >= self._most:
                return
            ahead_s = (line - position + 1) * self._line_s if self._line_s else _FIRST_DEADLINE_S
            self.fetch(plan.blocks_of(line), now + max(_SHORTEST_DEADLINE_S, ahead_s), line)
            self._next_line = line + 1

    def _is_wanted(self, block: BlockHash) -> bool:
        return not (block in self._under_way or self._uses.on_device(block) or self._held.contains(block))

    def _deliver(self, lane: Lane, header: BlockHeader, stored: Bytes) -> MissReason | None:
        return None if self._promote(lane, header, stored) else MissReason.NO_ROOM

    def _ended(self, block: BlockHash, result: MissReason | None, seconds: float) -> None:  # noqa: ARG002
        with self._lock:
            self._under_way.discard(block)
            self.outcomes[_OUTCOMES.get(result, "failed")] += 1


_OUTCOMES = {
    None: "fetched",
    MissReason.DEADLINE: "late",
    MissReason.CANCELLED: "cancelled",
    MissReason.NO_ROOM: "no_room",
}
