"""Blocks in host memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..buffers import Bytes
from ..errors import ConservationError
from ..eviction.base import EvictionPolicy
from ..header import BlockHeader
from ..identity import BlockHash
from ..outcomes import MissReason, StoreOutcome
from .base import Evictable, Tier, TierIndex, TierUsage
from .slab import Slab

_MOST_HELD_BACK = 2
"""Cold blocks looked at that may not leave yet, before a put is told to wait."""


@dataclass(slots=True)
class _Entry:
    header: BlockHeader
    slot: int
    pins: int = 0


@dataclass(frozen=True, slots=True)
class PinnedBlock:
    """A block held in place: ``padded`` is its whole slot, of which the first ``header.stored_bytes`` are the block."""

    header: BlockHeader
    padded: Bytes


class HostTier(Tier):
    """A slab of slots. Bytes are copied without the lock, between pin and unpin; the lock guards the books only.

    ``evictable`` lets the store hold back a block that a lower tier does not have yet.
    """

    def __init__(self, name: str, slab: Slab, policy: EvictionPolicy, door: TierIndex, evictable: Evictable) -> None:
        self.name = name
        self._slab = slab
        self._policy = policy
        self._door = door
        self._evictable = evictable
        self._lock = threading.Lock()
        self._entries: dict[BlockHash, _Entry] = {}
        self._filling: set[BlockHash] = set()
        self._detached = 0
        self._evictions = 0

    def store(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:
        """See `Tier.store`. FULL if every block is pinned or held back."""
        block = header.block
        with self._lock:
            if block in self._entries or block in self._filling:
                self._policy.touch(block)
                return StoreOutcome.PRESENT
            slot = self._take()
            if slot is None:
                return StoreOutcome.FULL
            self._filling.add(block)
        np.copyto(self._slab.view(slot)[: header.stored_bytes], stored[: header.stored_bytes])
        with self._lock:
            self._filling.discard(block)
            self._entries[block] = _Entry(header, slot)
            self._policy.insert(block)
            self._door.publish(block)
        return StoreOutcome.STORED

    def load(self, block: BlockHash, out: Bytes) -> BlockHeader | MissReason:
        """See `Tier.load`."""
        entry = self._pin(block, touch=True)
        if entry is None:
            return MissReason.ABSENT
        try:
            length = entry.header.stored_bytes
            if length > out.nbytes:
                return MissReason.LENGTH
            np.copyto(out[:length], self._slab.view(entry.slot)[:length])
            return entry.header
        finally:
            self._unpin(block, entry)

    @contextmanager
    def pinned(self, block: BlockHash, *, touch: bool = True) -> Iterator[PinnedBlock | None]:
        """Hold ``block`` in place, or None if it is absent. ``touch``: whether this counts as a use."""
        entry = self._pin(block, touch=touch)
        if entry is None:
            yield None
            return
        try:
            yield PinnedBlock(entry.header, self._slab.view(entry.slot))
        finally:
            self._unpin(block, entry)

    def contains(self, block: BlockHash) -> bool:
        """See `Tier.contains`."""
        return block in self._entries

    def touch(self, block: BlockHash) -> bool:
        """Whether ``block`` is held; if so this counts as a use."""
        if block not in self._entries:
            return False
        with self._lock:
            self._policy.touch(block)
            return block in self._entries

    def drop(self, block: BlockHash) -> bool:
        """See `Tier.drop`."""
        with self._lock:
            return self._remove(block, evicted=False)

    @property
    def free_slots(self) -> int:
        """Slots that can be taken without evicting."""
        return self._slab.free

    def coldest(self, limit: int | None = None) -> list[BlockHash]:
        """Up to ``limit`` blocks, all if None, in the order in which they should leave."""
        with self._lock:
            return self._policy.coldest(len(self._entries) if limit is None else limit)

    def usage(self) -> TierUsage:
        """See `Tier.usage`."""
        with self._lock:
            return TierUsage(
                total=self._slab.total,
                free=self._slab.free,
                used=len(self._entries),
                pinned=len(self._filling) + self._detached,
                allocated_bytes=self._slab.allocated_bytes,
                budget_bytes=self._slab.budget_bytes,
                evictions=self._evictions,
            )

    def check(self) -> None:
        """See `Tier.check`."""
        with self._lock:
            slots = [entry.slot for entry in self._entries.values()]
            accounted = self._slab.free + len(slots) + len(self._filling) + self._detached
            if accounted != self._slab.total:
                raise ConservationError(f"{self.name}: {accounted} of {self._slab.total} slots are accounted for")
            if len(set(slots)) != len(slots):
                raise ConservationError(f"{self.name}: a slot holds two blocks")
            if self._door.index.snapshot(self.name) != self._entries.keys():
                raise ConservationError(f"{self.name}: the index disagrees about which blocks are held")
            if sorted(self._policy.coldest(len(slots) + 1)) != sorted(self._entries):
                raise ConservationError(f"{self.name}: the eviction policy orders other blocks than are held")

    def close(self) -> None:
        """See `Tier.close`."""
        with self._lock:
            for block in list(self._entries):
                self._remove(block, evicted=False)
            self._slab.close()

    def _pin(self, block: BlockHash, *, touch: bool) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(block)
            if entry is not None:
                entry.pins += 1
                if touch:
                    self._policy.touch(block)
            return entry

    def _unpin(self, block: BlockHash, entry: _Entry) -> None:
        with self._lock:
            entry.pins -= 1
            if entry.pins == 0 and self._entries.get(block) is not entry:
                self._detached -= 1
                self._slab.give(entry.slot)

    def _take(self) -> int | None:
        """A slot to fill, evicting the coldest block that may go; None if the coldest ones are held back.

        Then one of those is worth waiting for, and a full tier need not be searched at every put. The lock is held.
        """
        slot = self._slab.take()
        look = 8
        while slot is None:
            candidates = self._policy.coldest(look)
            held_back = 0
            for block in candidates:
                if self._entries[block].pins:
                    continue
                if self._evictable(block):
                    self._remove(block, evicted=True)
                    self._evictions += 1
                    return self._slab.take()
                held_back += 1
                if held_back == _MOST_HELD_BACK:
                    return None
            if len(candidates) < look:
                return None
            look *= 8
        return slot

    def _remove(self, block: BlockHash, *, evicted: bool) -> bool:
        entry = self._entries.pop(block, None)
        if entry is None:
            return False
        self._door.withdraw(block)
        self._policy.remove(block, evicted=evicted)
        if entry.pins:
            self._detached += 1
        else:
            self._slab.give(entry.slot)
        return True
