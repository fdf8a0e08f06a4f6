"""Least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from ..identity import BlockHash
from .base import EvictionPolicy


class LRU(EvictionPolicy):
    """One queue: a touched block goes to its warm end."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlockHash, None] = OrderedDict()

    def insert(self, block: BlockHash) -> None:
        """See `EvictionPolicy.insert`."""
        self._order[block] = None
        self._order.move_to_end(block)

    def touch(self, block: BlockHash) -> None:
        """See `EvictionPolicy.touch`."""
        if block in self._order:
            self._order.move_to_end(block)

    def remove(self, block: BlockHash, *, evicted: bool) -> None:  # noqa: ARG002 - the same for it
        """See `EvictionPolicy.remove`."""
        self._order.pop(block, None)

    def coldest(self, limit: int) -> list[BlockHash]:
        """See `EvictionPolicy.coldest`."""
        return list(islice(self._order, limit))
