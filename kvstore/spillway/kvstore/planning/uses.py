"""The plan, what is expected besides, and what the device has: asked by the eviction policies of all tiers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

from ..identity import BlockHash
from .job_plan import JobPlan

EXPECTED = -1
"""The next use of a block that a preempted sequence waits for: before that of every line."""


class Use(Enum):
    """Answers that are no line number."""

    NEVER = "never"
    ON_DEVICE = "on_device"
    UNKNOWN = "unknown"


class NextUses:
    """When each block is needed next. Changed by one thread at a time; reading needs no lock."""

    def __init__(self) -> None:
        self.plan: JobPlan | None = None
        self._expected: dict[BlockHash, tuple[int, int]] = {}
        """Block → how many sequences wait for it, and its depth."""
        self._on_device: set[BlockHash] = set()

    def begin(self, plan: JobPlan | None) -> None:
        """Follow ``plan``; None: nothing is known. Nothing is expected and the device is taken to be empty."""
        self.plan = plan
        self._expected.clear()
        self._on_device.clear()

    def expect(self, chain: Sequence[BlockHash]) -> None:
        """A sequence was preempted: all of ``chain``, its blocks from the first on, is needed soon."""
        for depth, block in enumerate(chain):
            self._expected[block] = self._expected.get(block, (0, depth))[0] + 1, depth

    def met(self, chain: Sequence[BlockHash]) -> None:
        """The sequence goes on, or was given up: takes back one `expect`. Blocks that nobody expects are ignored."""
        for block in chain:
            waiting, depth = self._expected.get(block, (0, 0))
            if waiting > 1:
                self._expected[block] = waiting - 1, depth
            else:
                self._expected.pop(block, None)

    def took(self, blocks: Iterable[BlockHash]) -> None:
        """The device has ``blocks`` now."""
        if self.plan is not None:
            self._on_device.update(blocks)

    def let_go(self, blocks: Iterable[BlockHash]) -> None:
        """The device has ``blocks`` no more."""
        self._on_device.difference_update(blocks)

    def on_device(self, block: BlockHash) -> bool:
        """Whether the device has ``block``. Always False without a plan."""
        return block in self._on_device

    def depth(self, block: BlockHash) -> int:
        """How far into its lines ``block`` comes; 0 if nothing is known of it."""
        expected = self._expected.get(block)
        if expected is not None:
            return expected[1]
        return 0 if self.plan is None else self.plan.depth(block)

    def next_use(self, block: BlockHash) -> int | Use:
        """The line that needs ``block`` next (see `JobPlan.next_use`), or that none will, or that nothing is known."""
        if block in self._expected:
            return EXPECTED
        if self.plan is None:
            return Use.UNKNOWN
        line = self.plan.next_use(block)
        if line is not None:
            return line
        return Use.NEVER if self.plan.whole else Use.UNKNOWN
