"""The plan, how far it has come, and what is expected besides: asked by the eviction policies of all tiers."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from ..identity import BlockHash
from .job_plan import JobPlan


class Use(Enum):
    """Answers that are no line number."""

    NEVER = "never"
    ON_DEVICE = "on_device"
    UNKNOWN = "unknown"


class NextUses:
    """When each block is needed next. Changed by one thread at a time; reading needs no lock."""

    def __init__(self) -> None:
        self.plan: JobPlan | None = None
        self.position = 0
        self._expected: dict[BlockHash, int] = {}
        self._on_device: set[BlockHash] = set()

    def begin(self, plan: JobPlan | None) -> None:
        """Follow ``plan`` from its first line on; None: nothing is known."""
        self.plan = plan
        self.position = 0
        self._expected.clear()
        self._on_device.clear()

    def advance(self, position: int) -> list[BlockHash]:
        """All lines before ``position`` have begun; the blocks whose next use may have changed by that."""
        changed: dict[BlockHash, None] = {}
        plan, old = self.plan, self.position
        self.position = max(old, position)
        if plan is not None:
            for line in range(old, min(self.position, len(plan))):
                changed.update(dict.fromkeys(plan.blocks_of(line)))
        return list(changed)

    def expect(self, blocks: Iterable[BlockHash]) -> None:
        """``blocks`` are needed again soon, whatever the plan says: those of a sequence that was preempted."""
        self._expected.update(dict.fromkeys(blocks, self.position))

    def delivered(self, blocks: Iterable[BlockHash]) -> None:
        """``blocks`` were loaded: they are expected no more, and the device has them until it puts them again."""
        if self.plan is not None:
            for block in blocks:
                self._expected.pop(block, None)
                self._on_device.add(block)

    def returned(self, blocks: Iterable[BlockHash]) -> None:
        """``blocks`` were put: the device lets go of them."""
        if self.plan is not None:
            self._on_device.difference_update(blocks)

    def on_device(self, block: BlockHash) -> bool:
        """Whether ``block`` was delivered and not put since. Always False without a plan."""
        return block in self._on_device

    def depth(self, block: BlockHash) -> int:
        """How far into its lines ``block`` comes; 0 if the plan does not know it."""
        return 0 if self.plan is None else self.plan.depth(block)

    def next_use(self, block: BlockHash) -> int | Use:
        """The line that needs ``block`` next, or that no line will, or that the plan does not know it."""
        expected = self._expected.get(block)
        if expected is not None:
            return expected
        if self.plan is None or block not in self.plan:
            return Use.UNKNOWN
        line = self.plan.next_use(block, self.position)
        return Use.NEVER if line is None else line
