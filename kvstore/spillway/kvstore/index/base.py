"""The interface of a block index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..identity import BlockHash

PEER = "peer"
"""The name, in ``among`` of `BlockIndex.longest_prefix`, of all places on other nodes. No node's own tier has it."""


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
    def locate(self, block: BlockHash) -> tuple[Location, ...]:
        """Every known place of ``block``, nearest first; empty if there is none.

        An index with a remote part answers from what `longest_prefix` has just learned, else asks it, and never waits
        longer than its timeout.
        """

    @abstractmethod
    def longest_prefix(self, blocks: Sequence[BlockHash], among: Collection[str]) -> int:
        """How many leading ``blocks`` are each in at least one tier named in ``among``. No promise that they stay.

        `PEER` in ``among`` stands for other nodes' tiers; the other names are of this node's.
        """

    @abstractmethod
    def snapshot(self, tier: str) -> frozenset[BlockHash]:
        """All blocks this node has entered for ``tier``: for the conservation check, not for lookups."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the index holds. Remote entries of this node become invisible."""
