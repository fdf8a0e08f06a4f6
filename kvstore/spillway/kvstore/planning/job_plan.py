"""A job as the store sees it: which blocks each line needs, in the order in which the lines will run."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np

from ..identity import BlockHash


class JobPlan:
    """The prefix tree of a job's lines. A node is a block; a line is the path from a first block to its last one.

    Lines are numbered by the order in which they will begin. Memory: about 200 bytes per different block, 4 per use. A
    caller short of memory leaves out the tails that only one line has: the store then treats them as unplanned.
    """

    def __init__(self, chains: Iterable[Sequence[BlockHash]]) -> None:
        """``chains``: for each line in order, the hashes of its prompt's full blocks, first block first."""
        self._nodes: dict[BlockHash, int] = {}
        self._parents = array("i")
        self._depths = array("I")
        self._leaves = array("i")
        uses = array("I")
        lengths = array("I")
        for chain in chains:
            parent = -1
            for depth, block in enumerate(chain):
                node = self._nodes.setdefault(block, len(self._parents))
                if node == len(self._parents):
                    self._parents.append(parent)
                    self._depths.append(depth)
                uses.append(node)
                parent = node
            self._leaves.append(parent)
            lengths.append(len(chain))
        self._blocks = list(self._nodes)
        nodes = np.frombuffer(uses, dtype=np.uint32) if uses else np.empty(0, np.uint32)
        lines = np.repeat(np.arange(len(lengths), dtype=np.uint32), np.asarray(lengths, dtype=np.uint32))
        order = np.argsort(nodes, kind="stable")
        self._lines = array("I", lines[order].tobytes())
        counts = np.bincount(nodes, minlength=len(self._blocks)) if uses else np.zeros(0, np.int64)
        self._starts = array("Q", np.concatenate(([0], np.cumsum(counts))).astype(np.uint64).tobytes())

    def __len__(self) -> int:
        """How many lines there are."""
        return len(self._leaves)

    def __contains__(self, block: BlockHash) -> bool:
        return block in self._nodes

    def blocks_of(self, line: int) -> list[BlockHash]:
        """The blocks of a line, first block first; empty for a line that is not in the plan."""
        if not 0 <= line < len(self._leaves):
            return []
        path = []
        node = self._leaves[line]
        while node >= 0:
            path.append(self._blocks[node])
            node = self._parents[node]
        return path[::-1]

    def depth(self, block: BlockHash) -> int:
        """How many blocks come before ``block`` in a line; 0 if it is not planned."""
        node = self._nodes.get(block)
        return 0 if node is None else self._depths[node]

    def next_use(self, block: BlockHash, position: int) -> int | None:
        """The first line at or after ``position`` that needs ``block``; None if there is none, or it is not planned."""
        node = self._nodes.get(block)
        if node is None:
            return None
        start, end = self._starts[node], self._starts[node + 1]
        place = bisect_left(self._lines, position, start, end)
        return self._lines[place] if place < end else None
