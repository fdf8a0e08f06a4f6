"""Memory for the host tier: slots of one size, mapped in chunks as needed, never over budget.

A fresh page costs more to touch than to copy into, so chunks ask for huge pages and slots are reused most recent first.
"""

from __future__ import annotations

import mmap

import numpy as np

from ..buffers import Bytes, round_up
from ..errors import ConfigError

SLOT_METADATA_BYTES = 1024
"""Charged per slot for its header, its entry and its places in dictionaries and queues (measured: 600-900 bytes)."""
_CHUNK_BYTES = 64 << 20


class Slab:
    """Slots of ``slot_bytes`` within ``budget_bytes``, metadata included. Not thread-safe: its tier holds a lock."""

    def __init__(self, slot_bytes: int, budget_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.budget_bytes = budget_bytes
        self._stride = round_up(slot_bytes)
        self.total = budget_bytes // (self._stride + SLOT_METADATA_BYTES)
        if self.total < 1:
            raise ConfigError(
                f"{budget_bytes} bytes of host memory hold no block: one takes {self._stride + SLOT_METADATA_BYTES}"
            )
        self._chunk_slots = max(1, min(self.total, _CHUNK_BYTES // self._stride))
        self._chunks: list[Bytes] = []
        self._grown = 0
        self._free: list[int] = []

    @property
    def free(self) -> int:
        """Slots that can be taken now, those not yet mapped included."""
        return len(self._free) + self.total - self._grown

    @property
    def allocated_bytes(self) -> int:
        """Bytes mapped so far, and the metadata of the slots in them. Pages no block has touched take no memory yet."""
        return self._grown * (self._stride + SLOT_METADATA_BYTES)

    def take(self) -> int | None:
        """A free slot, or None."""
        if not self._free and self._grown < self.total:
            self._grow()
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Return a slot."""
        self._free.append(slot)

    def view(self, slot: int) -> Bytes:
        """The bytes of ``slot``: page-aligned, padded to whole pages."""
        chunk, position = divmod(slot, self._chunk_slots)
        return self._chunks[chunk][position * self._stride : (position + 1) * self._stride]

    def close(self) -> None:
        """Let go of the memory; it is unmapped when the last view of it is gone."""
        self._chunks.clear()
        self._free.clear()

    def _grow(self) -> None:
        slots = min(self._chunk_slots, self.total - self._grown)
        memory = mmap.mmap(-1, slots * self._stride)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._chunks.append(np.frombuffer(memory, dtype=np.uint8))
        self._free.extend(range(self._grown + slots - 1, self._grown - 1, -1))
        self._grown += slots
