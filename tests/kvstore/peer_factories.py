"""Stores and servers that are each other's peers, for the tests of the peer tier."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kv_factories import BLOCK_BYTES, IDENTITY, host_bytes

from spillway.kvstore import BlockHash, PeersConfig
from spillway.kvstore.buffers import Bytes
from spillway.kvstore.eviction.lru import LRU
from spillway.kvstore.header import BlockHeader
from spillway.kvstore.index.base import PEER, Location
from spillway.kvstore.index.memory import MemoryIndex
from spillway.kvstore.outcomes import MissReason, StoreOutcome
from spillway.kvstore.peer.orders import Orders
from spillway.kvstore.peer.server import BlockServer
from spillway.kvstore.peer.sources import Sources
from spillway.kvstore.peer.tier import PeerTier
from spillway.kvstore.peer.wire import Result
from spillway.kvstore.sealing import Sealer
from spillway.kvstore.tiers.base import Tier, TierIndex, TierUsage
from spillway.kvstore.tiers.host import HostTier
from spillway.kvstore.tiers.slab import Slab
from spillway.kvstore.transfer.lane import Lane

TOKEN = b"a token of the tests"
PATIENT_S = 60.0
FABRIC = False
"""Whether peers of the tests give each other blocks by NIXL."""


def peers(listen: str = "127.0.0.1:0", **settings: object) -> PeersConfig:
    """Settings whose deadlines a starved test machine does not miss."""
    return PeersConfig(**{"token": TOKEN, "listen": listen, "stall_s": PATIENT_S, "fabric": FABRIC, **settings})


class KnownPeers(MemoryIndex):
    """This node's own entries, and what the test says that others hold."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: dict[BlockHash, tuple[Location, ...]] = {}

    def say(self, blocks: Sequence[BlockHash], *addresses: str, generation: int = 0) -> None:
        """``blocks`` are held by the servers at ``addresses``."""
        for block in blocks:
            self.remote[block] = tuple(Location("host", at, generation, at) for at in addresses)

    def locate(self, blocks: Sequence[BlockHash]) -> list[tuple[Location, ...]]:
        here = super().locate(blocks)
        return [(*own, *self.remote.get(block, ())) for block, own in zip(blocks, here, strict=True)]

    def longest_prefix(self, blocks: Sequence[BlockHash], among: Collection[str]) -> int:
        for count, block in enumerate(blocks):
            here = super().longest_prefix((block,), among)
            if not here and not (PEER in among and block in self.remote):
                return count
        return len(blocks)


class Served:
    """A host tier of ``blocks`` blocks behind a block server."""

    def __init__(self, blocks: int, config: PeersConfig | None = None, generation: int = 0) -> None:
        slab = Slab(BLOCK_BYTES, host_bytes(blocks))
        self.held = HostTier("host", slab, LRU(), TierIndex(MemoryIndex(), "host"), lambda block: True)
        self.sealer = Sealer(IDENTITY.digest(), BLOCK_BYTES)
        sources = Sources(Lane(self.held, self.sealer), self.held, None)
        self.generation = generation
        self.server = BlockServer(config or peers(), IDENTITY.digest(), sources, lambda: self.generation)
        self.server.start(Orders([Lane(self.held, self.sealer)], lambda blocks: [Result.FAILED] * len(blocks)))

    def close(self) -> None:
        assert self.server.close(PATIENT_S)
        self.held.check()
        assert self.held.usage().pinned == 0
        self.held.close()


class ThroughAPeer(Tier):
    """Stores straight into a served host tier, and loads over a socket: so that the suite of tiers holds for loads."""

    def __init__(self, blocks: int) -> None:
        self.name = "peer"
        self._served = Served(blocks)
        self._index = KnownPeers()
        self._client = PeerTier(peers(""), IDENTITY.digest(), self._index, PATIENT_S)

    def store(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:
        return self._served.held.store(header, stored)

    def load(self, block: BlockHash, out: Bytes) -> BlockHeader | MissReason:
        self._client._doubts.clear()  # the tests store again at once what was absent
        self._index.say((block,), self._served.server.address)
        return self._client.load(block, out)

    def contains(self, block: BlockHash) -> bool:
        return self._served.held.contains(block)

    def drop(self, block: BlockHash) -> bool:
        return self._served.held.drop(block)

    def usage(self) -> TierUsage:
        return self._served.held.usage()

    def check(self) -> None:
        self._served.held.check()
        assert self._client.connections()[1] == 0, "a connection was not handed back"

    def close(self) -> None:
        self._client.close()
        self._served.close()
