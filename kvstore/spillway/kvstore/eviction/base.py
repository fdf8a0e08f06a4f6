"""The interface of an eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..identity import BlockHash


class EvictionPolicy(ABC):
    """Orders the blocks of one tier. It decides nothing alone: the tier skips pinned blocks and says what it evicted.

    Not thread-safe: the tier that owns it calls it under its lock.
    """

    @abstractmethod
    def insert(self, block: BlockHash) -> None:
        """``block`` came into the tier."""

    @abstractmethod
    def touch(self, block: BlockHash) -> None:
        """``block`` was loaded, or put again. Unknown blocks are ignored."""

    @abstractmethod
    def remove(self, block: BlockHash, *, evicted: bool) -> None:
        """``block`` left the tier: ``evicted`` to make room, otherwise dropped or found damaged."""

    @abstractmethod
    def coldest(self, limit: int) -> list[BlockHash]:
        """Up to ``limit`` blocks in the order in which they should leave. Changes nothing."""
