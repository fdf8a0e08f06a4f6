"""Loads from peers: a chain of blocks in one round trip, delivered as they stream in."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from ..header import BlockHeader
from ..identity import BlockHash
from ..outcomes import MissReason
from ..transfer.lane import Lane
from ..transfer.reads import Priority, ReadBatch, ReadQueue
from .tier import PeerTier
from .wire import MOST_BLOCKS

_log = logging.getLogger(__name__)

_PREFETCH_AT_ONCE = 8
"""So few, that a load need not wait long for a thread."""


class PeerReads(ReadQueue):
    """A `ReadQueue` whose threads each take many requests of a batch together."""

    def __init__(self, lane: Lane, tier: PeerTier, threads: int) -> None:
        """``tier``: the lane's own."""
        self._tier = tier
        super().__init__(lane, threads)

    def holds(self, blocks: Sequence[BlockHash]) -> list[bool]:
        """See `ReadQueue.holds`."""
        return self._tier.holds(blocks)

    def _at_once(self, priority: Priority) -> int:
        return MOST_BLOCKS if priority is Priority.LOAD else _PREFETCH_AT_ONCE

    def _serve(self, batch: ReadBatch, positions: Sequence[int]) -> None:
        start = time.perf_counter()
        open_positions = set(positions)

        def arrived(number: int, answer: BlockHeader | MissReason) -> bool:
            position = positions[number]
            block = batch.requests[position].block
            open_positions.discard(position)
            self._end(batch, position, start, lambda: self.lane.judge(block, answer, self._buffer.bytes))
            return batch.pointless() is None

        try:
            if batch.pointless() is None:
                blocks = [batch.requests[position].block for position in positions]
                self._tier.load_each(blocks, self._buffer.bytes, batch.deadline, arrived)
        except Exception:  # noqa: BLE001 - a defect must cost these blocks, not the thread that all later loads need
            _log.exception("loading from peers failed in an unforeseen way")
        finally:
            for position in sorted(open_positions):
                self._end(batch, position, start, lambda: batch.pointless() or MissReason.INTERNAL)
