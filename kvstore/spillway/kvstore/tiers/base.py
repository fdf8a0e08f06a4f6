"""The interface of a tier, and what its calls answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from ..buffers import Bytes
from ..header import BlockHeader
from ..identity import BlockHash
from ..index.base import BlockIndex
from ..outcomes import MissReason, StoreOutcome


@dataclass(frozen=True, slots=True)
class TierUsage:
    """How full a tier is. Slots: ``total`` = ``free`` + ``used`` + ``foreign`` + ``pinned`` + ``lost``.

    ``pinned``: slots whose block has left the books but whose bytes are still being read, or are just being written.
    ``foreign``: slots that hold blocks of another identity. ``lost``: slots given up after an I/O error.
    ``damaged``: headers and files that were found damaged when the tier was opened; their slots are in use again.
    ``allocated_bytes``: memory or file bytes taken, metadata included; never above ``budget_bytes``.
    """

    total: int
    free: int
    used: int
    pinned: int
    foreign: int = 0
    lost: int = 0
    damaged: int = 0
    allocated_bytes: int = 0
    budget_bytes: int = 0
    evictions: int = 0
    foreign_evictions: int = 0


class Tier(ABC):
    """Holds stored bytes under block hashes, within a budget. It evicts; it does not verify, the store does that.

    A tier enters a block in its index when the block is complete, under its lock, and takes it out before the bytes are
    reused. ``store`` and ``load`` block until done and may be called from many threads; the others look at the books.
    """

    name: str

    @abstractmethod
    def store(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:
        """Copy ``stored`` (``header.stored_bytes`` bytes) in and enter it, evicting if need be. Raises nothing."""

    @abstractmethod
    def load(self, block: BlockHash, out: Bytes) -> BlockHeader | MissReason:
        """Copy a block's stored bytes into the start of ``out`` and return the header found beside them. Unverified."""

    @abstractmethod
    def contains(self, block: BlockHash) -> bool:
        """Whether ``load`` would find ``block``. No I/O."""

    @abstractmethod
    def drop(self, block: BlockHash) -> bool:
        """Forget ``block``; whether it was held."""

    @abstractmethod
    def usage(self) -> TierUsage:
        """How full the tier is, now."""

    @abstractmethod
    def check(self) -> None:
        """Raise `ConservationError` if the books do not add up or the index disagrees."""

    @abstractmethod
    def close(self) -> None:
        """Release memory and files. No other call may be in flight. A durable tier stays warm for the next open."""


@dataclass(frozen=True, slots=True)
class TierIndex:
    """A tier's own door into the index."""

    index: BlockIndex
    tier: str

    def publish(self, block: BlockHash) -> None:
        """Enter ``block``."""
        self.index.publish(self.tier, (block,))

    def withdraw(self, block: BlockHash) -> None:
        """Take ``block`` out."""
        self.index.withdraw(self.tier, (block,))


Evictable = Callable[[BlockHash], bool]
"""Asked under the tier's lock before a block is evicted; False keeps it for now."""
