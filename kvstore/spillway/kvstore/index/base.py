"""The interface of a block index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..identity import BlockHash

PEER = "peer"
"""The name, in ``among`` of `BlockIndex.longest_prefix`, of all places on other nodes. No node's own tier has it."""

MOST_AT_ONCE = 1024
"""Blocks that one round trip of `BlockIndex.locate` asks about."""


@dataclass(frozen=True, slots=True)
class Location:
    """A place a block can be loaded from. ``node`` is empty for this node; ``tier`` is the tier's name there.

    ``generation``: of the node's lease, which its block server must confirm. ``address``: ``host:port`` of that server,
    empty where it serves nobody.
    """

    tier: str
    node: str = ""
    generation: int = 0
    address: str = ""


@dataclass(frozen=True, slots=True)
class IndexStats:
    """The part of an index that nodes share.

    ``calls``: by outcome. ``near``: blocks looked up, by whether a recent answer was used again. ``writer``: what
    became of changes: written, dropped, resyncs, fenced, cleaned, forgotten. ``generation``: of this node's lease, 0
    before it had one; ``held``: whether it holds the lease, as far as it knows.
    """

    calls: dict[str, int]
    near: dict[str, int]
    writer: dict[str, int]
    queued_changes: int
    generation: int
    held: bool
    breaker: str
    breaker_trips: int


class BlockIndex(ABC):
    """Which blocks are where. A store publishes only complete blocks, and withdraws before a block's bytes are reused.

    ``publish`` and ``withdraw`` are called with a tier's lock held, in the order the tier changed: they must not wait
    for a network. An index with a remote part queues there and answers from its local part at once. All methods are
    thread-safe.
    """

    @abstractmethod
    def publish(self, tier: str, blocks: Sequence[BlockHash]) -> None:
        """Enter blocks that this node's ``tier`` now holds. Entering one twice changes nothing."""

    @abstractmethod
    def withdraw(self, tier: str, blocks: Sequence[BlockHash]) -> None:
        """Remove this node's entries for ``blocks`` in ``tier``. Removing an absent one changes nothing."""

    @abstractmethod
    def locate(self, blocks: Sequence[BlockHash]) -> list[tuple[Location, ...]]:
        """Every known place of each of ``blocks``, nearest first; empty for one that has none.

        An index with a remote part answers from what it has just learned, else asks it, in one round trip for
        `MOST_AT_ONCE` blocks, and never waits longer than its timeout.
        """

    @abstractmethod
    def longest_prefix(self, blocks: Sequence[BlockHash], among: Collection[str]) -> int:
        """How many leading ``blocks`` are each in at least one tier named in ``among``. No promise that they stay.

        `PEER` in ``among`` stands for other nodes' tiers; the other names are of this node's.
        """

    @abstractmethod
    def snapshot(self, tier: str) -> frozenset[BlockHash]:
        """All blocks this node has entered for ``tier``: for the conservation check, not for lookups."""

    @property
    def generation(self) -> int:
        """Of this node's lease, now: what its block server must confirm. 0 where nodes share nothing."""
        return 0

    @abstractmethod
    def stats(self) -> IndexStats | None:
        """Figures of the part that nodes share; None where they share nothing."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the index holds. Remote entries of this node become invisible."""
