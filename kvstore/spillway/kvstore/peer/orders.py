"""What people may have a node do with its blocks, over the protocol of peers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..buffers import ThreadBuffer, round_up
from ..header import BlockHeader
from ..identity import BlockHash
from ..outcomes import MissReason
from ..transfer.lane import Lane
from .wire import Result, Verb

Warm = Callable[[Sequence[BlockHash]], list[Result]]
"""Has blocks brought to host memory, and tells at once which are there already."""


class Orders:
    """Carries out orders on a node's own tiers. Nothing that it does can lose more than work. Thread-safe."""

    def __init__(self, lanes: Sequence[Lane], warm: Warm) -> None:
        self._lanes = lanes
        self._warm = warm
        self._buffer = ThreadBuffer(max(round_up(lane.sealer.stored_bytes) for lane in lanes))

    def carry_out(self, verb: Verb, blocks: Sequence[BlockHash], until: float) -> list[Result]:
        """One result per block; those not come to by ``until`` (monotonic) have failed."""
        if verb is Verb.WARM:
            return self._warm(blocks)
        one = self._check if verb is Verb.CHECK else self._drop
        return [one(block) if time.monotonic() < until else Result.FAILED for block in blocks]

    def _check(self, block: BlockHash) -> Result:
        """The worst of all copies. A damaged one is withdrawn, as after any load."""
        return max((self._check_copy(lane, block) for lane in self._lanes), default=Result.ABSENT)

    def _check_copy(self, lane: Lane, block: BlockHash) -> Result:
        if not lane.tier.contains(block):
            return Result.ABSENT
        if not lane.breaker.allow():
            return Result.FAILED
        answer = lane.fetch(block, self._buffer.bytes)
        if isinstance(answer, BlockHeader):
            return Result.DONE
        if answer.damaged:
            return Result.DAMAGED
        return Result.ABSENT if answer is MissReason.ABSENT else Result.FAILED

    def _drop(self, block: BlockHash) -> Result:
        dropped = [lane.tier.drop(block) for lane in self._lanes]
        return Result.DONE if any(dropped) else Result.ABSENT
