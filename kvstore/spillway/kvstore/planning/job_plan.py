"""A job as the store sees it: which blocks the coming lines need, in the order in which they will begin."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from sys import maxsize

from ..identity import BlockHash

_OPEN = maxsize
"""End of a stretch of lines whose last one is the last that is known: the next may have the block too."""


class JobPlan:
    """A window over the lines of a job: lines enter at its end as they become known and leave it as they begin.

    A line is the chain of its prompt's full blocks. A block's uses are kept as stretches of consecutive lines, since
    lines that share a prefix mostly stand together: a document that ten thousand lines ask about is one stretch, and
    entering or leaving a line costs time only for what it does not share with its neighbour. Memory: about 300 bytes
    per different block of the window, and 8 per block of each of its lines.

    ``whole``: nothing but these lines, and lines that share only with the last of them, will ask for blocks. What they
    do not need is then needed by nobody; otherwise nothing is known of it.

    One thread changes a plan; others may ask for uses and depths meanwhile, since entries are replaced, never changed.
    """

    def __init__(self, chains: Iterable[Sequence[BlockHash]] = (), *, whole: bool = False) -> None:
        """``chains``: for each line in order, its blocks, first block first. Given any, these are all: see `end`."""
        self.whole = whole
        self.position = 0
        """The first line that has not begun."""
        self.lines = 0
        """How many lines were ever entered. They are numbered from 0."""
        self._window: deque[tuple[BlockHash, ...]] = deque()
        self._last: tuple[BlockHash, ...] = ()
        self._uses: dict[BlockHash, tuple[int, ...]] = {}
        """Block → its depth, then first line and end of each stretch that is not over."""
        for chain in chains:
            self.append(chain)
        self.end()

    def __contains__(self, block: BlockHash) -> bool:
        return block in self._uses

    def __len__(self) -> int:
        """How many different blocks the lines of the window need."""
        return len(self._uses)

    def append(self, chain: Sequence[BlockHash]) -> list[BlockHash]:
        """Enter the next line; the blocks whose next use changed by that."""
        shared = _shared(self._last, chain)
        changed = self._close(self._last[shared:])
        for depth, block in enumerate(chain[shared:], shared):
            uses = self._uses.get(block)
            if uses is None:
                changed.append(block)
                uses = (depth,)
            self._uses[block] = (*uses, self.lines, _OPEN)
        self._last = (*self._last[:shared], *chain[shared:])
        self._window.append(self._last)
        self.lines += 1
        return changed

    def end(self) -> list[BlockHash]:
        """No further line shares with the last one; the blocks whose next use changed by that."""
        changed = self._close(self._last)
        self._last = ()
        return changed

    def advance(self, position: int) -> list[BlockHash]:
        """All lines before ``position`` have begun; the blocks whose next use changed by that. Positions only rise."""
        changed: list[BlockHash] = []
        while self.position < min(position, self.lines):
            chain = self._window.popleft()
            self.position += 1
            for block in reversed(chain):
                uses = self._uses[block]
                if uses[2] > self.position:  # and so do all before it, since the next line shares a prefix
                    break
                self._drop_stretch(block, uses)
                changed.append(block)
        return changed

    def blocks_of(self, line: int) -> tuple[BlockHash, ...]:
        """The blocks of a line that has not begun, first block first; empty for one that is not in the window."""
        return self._window[line - self.position] if self.position <= line < self.lines else ()

    def depth(self, block: BlockHash) -> int:
        """How many blocks come before ``block`` in a line; 0 if no coming line needs it."""
        uses = self._uses.get(block)
        return 0 if uses is None else uses[0]

    def next_use(self, block: BlockHash) -> int | None:
        """The first line of the first stretch that is not over; None if no coming line needs ``block``.

        For a block that the line at `position` needs this may be an earlier one: the number then stays the same for
        the whole stretch, and whoever sorts by it has nothing to do while the stretch lasts.
        """
        uses = self._uses.get(block)
        return None if uses is None else uses[1]

    def _close(self, blocks: Iterable[BlockHash]) -> list[BlockHash]:
        changed = []
        for block in blocks:
            uses = (*self._uses[block][:-1], self.lines)
            if uses[2] > self.position:
                self._uses[block] = uses
            else:
                self._drop_stretch(block, uses)
                changed.append(block)
        return changed

    def _drop_stretch(self, block: BlockHash, uses: tuple[int, ...]) -> None:
        if len(uses) > 3:
            self._uses[block] = (uses[0], *uses[3:])
        else:
            del self._uses[block]


def _shared(one: Sequence[BlockHash], other: Sequence[BlockHash]) -> int:
    """Length of the common prefix."""
    count = 0
    for mine, others in zip(one, other, strict=False):
        if mine != others:
            break
        count += 1
    return count
