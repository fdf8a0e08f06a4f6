"""ARC: adapts between recency and frequency by what it regrets to have evicted."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from ..identity import BlockHash
from .base import EvictionPolicy

_Queue = OrderedDict[BlockHash, None]


class ARC(EvictionPolicy):
    """Adaptive replacement (Megiddo and Modha, FAST 2003), with the tier deciding when and how many blocks leave.

    ``recent`` holds blocks used once, ``frequent`` those used again; a ghost of each remembers what left. A block that
    comes back while its ghost is known moves the target size of ``recent`` (``p`` in the paper) towards that side.
    """

    def __init__(self, capacity: int) -> None:
        """``capacity``: about how many blocks the tier holds; it bounds the ghosts."""
        self._capacity = max(1, capacity)
        self._target = 0.0
        self._recent: _Queue = OrderedDict()
        self._frequent: _Queue = OrderedDict()
        self._recent_ghosts: _Queue = OrderedDict()
        self._frequent_ghosts: _Queue = OrderedDict()

    def insert(self, block: BlockHash) -> None:
        """See `EvictionPolicy.insert`. The paper's cases II to IV."""
        if block in self._recent or block in self._frequent:
            self.touch(block)
        elif block in self._recent_ghosts:
            step = max(1.0, len(self._frequent_ghosts) / len(self._recent_ghosts))
            self._target = min(float(self._capacity), self._target + step)
            del self._recent_ghosts[block]
            self._frequent[block] = None
        elif block in self._frequent_ghosts:
            step = max(1.0, len(self._recent_ghosts) / len(self._frequent_ghosts))
            self._target = max(0.0, self._target - step)
            del self._frequent_ghosts[block]
            self._frequent[block] = None
        else:
            self._recent[block] = None
        self._trim_ghosts()

    def touch(self, block: BlockHash) -> None:
        """See `EvictionPolicy.touch`. The paper's case I."""
        if block in self._recent:
            del self._recent[block]
            self._frequent[block] = None
        elif block in self._frequent:
            self._frequent.move_to_end(block)

    def remove(self, block: BlockHash, *, evicted: bool) -> None:
        """See `EvictionPolicy.remove`. Only an evicted block leaves a ghost."""
        for queue, ghosts in ((self._recent, self._recent_ghosts), (self._frequent, self._frequent_ghosts)):
            if block in queue:
                del queue[block]
                if evicted:
                    ghosts[block] = None
        self._trim_ghosts()

    def coldest(self, limit: int) -> list[BlockHash]:
        """See `EvictionPolicy.coldest`: what the paper's REPLACE would take, one after the other."""
        recent, frequent = iter(self._recent), iter(self._frequent)
        over = max(0, int(len(self._recent) - self._target))
        order = list(islice(recent, min(limit, over)))
        order += islice(frequent, limit - len(order))
        order += islice(recent, limit - len(order))
        return order

    def _trim_ghosts(self) -> None:
        while len(self._recent_ghosts) > max(0, self._capacity - len(self._recent)):
            self._recent_ghosts.popitem(last=False)
        everything = 2 * self._capacity
        while self._frequent_ghosts and self._known() > everything:
            self._frequent_ghosts.popitem(last=False)

    def _known(self) -> int:
        return len(self._recent) + len(self._frequent) + len(self._recent_ghosts) + len(self._frequent_ghosts)
