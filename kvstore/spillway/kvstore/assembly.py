"""Puts a store's parts together from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import StoreConfig
from .errors import ConfigError
from .eviction.next_use import NextUse
from .index.base import BlockIndex
from .peer.reads import PeerReads
from .peer.server import BlockServer
from .peer.sources import Sources
from .peer.tier import PeerTier
from .planning.uses import NextUses
from .sealing import Sealer
from .tiers.base import Tier, TierIndex
from .tiers.disk.tier import DiskConfig, DiskTier
from .tiers.faulty import FaultyTier
from .tiers.host import HostTier
from .tiers.slab import Slab
from .transfer.demotion import Demotion
from .transfer.lane import Lane
from .transfer.reads import ReadQueue


@dataclass(frozen=True, slots=True)
class Parts:
    """What a store is made of. ``readers``: tiers below host memory that blocks are loaded from, nearest first.

    ``own``: those of them that belong to this node. ``server``: has its address, and is still to be started.
    """

    index: BlockIndex
    uses: NextUses
    policies: tuple[NextUse, ...]
    held: HostTier
    host: Lane
    demotion: Demotion
    readers: tuple[ReadQueue, ...]
    own: tuple[Tier, ...]
    server: BlockServer | None


def assemble(config: StoreConfig, index: BlockIndex, remote: Sequence[Tier]) -> Parts:
    """Open every tier and start its threads. ``remote``: further tiers to load from, after the disk.

    Raises `ConfigError` and `MountError`; then nothing stays open but ``index`` and ``remote``.
    """
    identity = config.identity.digest()
    host_codec, disk_codec = config.codecs.build(config.identity.kv_dtype)
    host_sealer = Sealer(identity, config.block_bytes, host_codec)
    plain = Sealer(identity, config.block_bytes)
    retains = config.host_bytes > 0
    name = "host" if retains else "staging"
    slab = Slab(host_sealer.stored_bytes, config.host_bytes if retains else config.staging_bytes)
    uses = NextUses()
    host_policy = NextUse(uses, config.policy(slab.total), below_device=True)
    policies = [host_policy]
    readers: list[ReadQueue] = []
    disk: Lane | None = None
    if config.disk_dir is not None:
        keys = config.disk_keys.for_identity(identity) if config.disk_keys else None
        sealer = Sealer(identity, config.block_bytes, disk_codec, keys)
        disk_policy = NextUse(uses, config.policy(config.disk_bytes // config.disk_sharers // sealer.stored_bytes))
        policies.append(disk_policy)
        disk = Lane(_open_disk(config, sealer.stored_bytes, disk_policy, index), sealer)
        readers.append(ReadQueue(disk, config.read_threads))
    readers += [ReadQueue(Lane(tier, plain), config.read_threads) for tier in remote]
    own = tuple(reader.lane.tier for reader in readers)
    if config.peers is not None:
        peer_tier = PeerTier(config.peers, identity, index, config.deadlines.load_s)
        readers.append(PeerReads(Lane(peer_tier, host_sealer), peer_tier, config.read_threads))
    demotion = Demotion(host_policy, disk, retains=retains)
    held = HostTier(name, slab, host_policy, TierIndex(index, name), demotion.may_leave)
    host = Lane(held, host_sealer)
    demotion.start(host, held, lambda: sum(reader.urgent for reader in readers), config.write_threads)
    server = None
    if config.peers is not None and config.peers.listen:
        try:
            server = BlockServer(config.peers, identity, Sources(host, held, disk), lambda: index.generation)
        except ConfigError:
            demotion.close(config.deadlines.close_s)
            for reader in readers:
                reader.close(config.deadlines.close_s)
            for tier in (held, *own):
                tier.close()
            raise
    return Parts(index, uses, tuple(policies), held, host, demotion, tuple(readers), own, server)


def _open_disk(config: StoreConfig, stored_bytes: int, policy: NextUse, index: BlockIndex) -> Tier:
    assert config.disk_dir is not None
    disk = DiskConfig(
        directory=config.disk_dir,
        budget_bytes=config.disk_bytes,
        stored_bytes=stored_bytes,
        identity=config.identity,
        sharers=config.disk_sharers,
        free_floor_bytes=config.disk_free_floor_bytes,
    )
    tier = DiskTier("disk", disk, policy, TierIndex(index, "disk"))
    return FaultyTier(tier, config.disk_faults) if config.disk_faults else tier
