"""The embedded index: one dictionary, this node's tiers only."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from ..identity import BlockHash
from .base import BlockIndex, Location


class MemoryIndex(BlockIndex):
    """Block → bit set of tiers. Bits go by the order in which tiers were first named, the nearest first.

    Lookups take no lock: a dictionary read is atomic, and an answer is a snapshot without promise in any case.
    """

    def __init__(self, tiers: Sequence[str] = ()) -> None:
        self._lock = threading.Lock()
        self._bits: dict[BlockHash, int] = {}
        self._bit_of = {tier: 1 << position for position, tier in enumerate(tiers)}

    def publish(self, tier: str, blocks: Sequence[BlockHash]) -> None:
        """See `BlockIndex.publish`."""
        with self._lock:
            bit = self._bit_of.setdefault(tier, 1 << len(self._bit_of))
            for block in blocks:
                self._bits[block] = self._bits.get(block, 0) | bit

    def withdraw(self, tier: str, blocks: Sequence[BlockHash]) -> None:
        """See `BlockIndex.withdraw`."""
        with self._lock:
            keep = ~self._bit_of.get(tier, 0)
            for block in blocks:
                left = self._bits.get(block, 0) & keep
                if left:
                    self._bits[block] = left
                else:
                    self._bits.pop(block, None)

    def locate(self, blocks: Sequence[BlockHash]) -> list[tuple[Location, ...]]:
        """See `BlockIndex.locate`."""
        return [tuple(Location(tier) for tier in self.tiers_of(block)) for block in blocks]

    def tiers_of(self, block: BlockHash) -> list[str]:
        """The tiers that have ``block``, the nearest first."""
        bits = self._bits.get(block, 0)
        return [tier for tier, bit in self._bit_of.items() if bits & bit] if bits else []

    def longest_prefix(self, blocks: Sequence[BlockHash], among: Collection[str]) -> int:
        """See `BlockIndex.longest_prefix`."""
        mask = sum(self._bit_of.get(tier, 0) for tier in set(among))
        bits = self._bits
        for count, block in enumerate(blocks):
            if not bits.get(block, 0) & mask:
                return count
        return len(blocks)

    def absent(self, blocks: Sequence[BlockHash], among: Collection[str]) -> Sequence[int]:
        """Positions of the ``blocks`` that are in no tier named in ``among``."""
        if self._bits.keys().isdisjoint(blocks):
            return range(len(blocks))
        mask = sum(self._bit_of.get(tier, 0) for tier in set(among))
        bits = self._bits
        return [position for position, block in enumerate(blocks) if not bits.get(block, 0) & mask]

    def snapshot(self, tier: str) -> frozenset[BlockHash]:
        """See `BlockIndex.snapshot`."""
        mask = self._bit_of.get(tier, 0)
        with self._lock:
            return frozenset(block for block, bits in self._bits.items() if bits & mask)

    def stats(self) -> None:
        """See `BlockIndex.stats`."""

    def entered(self) -> list[BlockHash]:
        """All blocks that are in some tier, in the order in which they came."""
        with self._lock:
            return list(self._bits)

    def close(self) -> None:
        """See `BlockIndex.close`."""
        with self._lock:
            self._bits.clear()
