"""Blocks, identities and tiers for the tests of the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from spillway.kvstore import BlockHash, Deadlines, Faults, KVIdentity, StoreConfig, block_hash
from spillway.kvstore.buffers import Bytes
from spillway.kvstore.eviction.lru import LRU
from spillway.kvstore.header import BlockHeader
from spillway.kvstore.index.memory import MemoryIndex
from spillway.kvstore.sealing import Sealer
from spillway.kvstore.tiers.base import Tier, TierIndex
from spillway.kvstore.tiers.disk import tier as disk_module
from spillway.kvstore.tiers.disk.segment import Geometry
from spillway.kvstore.tiers.disk.tier import DiskConfig, DiskTier
from spillway.kvstore.tiers.faulty import FaultyTier
from spillway.kvstore.tiers.host import HostTier
from spillway.kvstore.tiers.slab import SLOT_METADATA_BYTES, Slab

BLOCK_BYTES = 8192
HOST_SLOT_BYTES = BLOCK_BYTES + SLOT_METADATA_BYTES
SHARE_RESERVE_BYTES = 64 << 10
"""What a share of a disk directory keeps for its books."""

IDENTITY = KVIdentity("weights-a", "float32", "none", 16, (0, 2), 0, 1, "rope-a")
OTHER_IDENTITY = replace(IDENTITY, weights_digest="weights-b")


PATIENT = Deadlines(put_s=60, load_s=60)
"""Deadlines that a starved test machine does not miss: tests of deadlines set their own."""


def name(number: int, identity: KVIdentity = IDENTITY) -> BlockHash:
    return block_hash(identity.root(), [number])


def content(number: int, length: int = BLOCK_BYTES) -> Bytes:
    """Bytes that differ between any two numbers, at every page."""
    return np.random.default_rng(number).integers(0, 256, length, dtype=np.uint8)


def blank(length: int = BLOCK_BYTES) -> Bytes:
    return np.full(length, 0xEE, dtype=np.uint8)


def host_bytes(blocks: int) -> int:
    return blocks * HOST_SLOT_BYTES


def disk_bytes(blocks: int, sharers: int = 1) -> int:
    return sharers * (Geometry(BLOCK_BYTES, blocks).reserved_bytes + SHARE_RESERVE_BYTES)


def store_config(directory: Path | None, host: int = 0, disk: int = 0, **settings: object) -> StoreConfig:
    """A store of ``host`` and ``disk`` blocks."""
    config = StoreConfig(
        BLOCK_BYTES,
        IDENTITY,
        host_bytes=host_bytes(host),
        disk_bytes=disk_bytes(disk) if disk else 0,
        disk_dir=directory if disk else None,
        disk_free_floor_bytes=0,
        staging_bytes=host_bytes(16),
        deadlines=PATIENT,
    )
    return replace(config, **settings)


def header_of(number: int, data: Bytes) -> BlockHeader:
    return Sealer(IDENTITY.digest(), data.nbytes).seal_plain(name(number), data)


def disk_tier(directory: Path, blocks: int, identity: KVIdentity = IDENTITY, **settings: int) -> DiskTier:
    config = DiskConfig(directory, disk_bytes(blocks), BLOCK_BYTES, identity, **settings)
    return DiskTier("disk", config, LRU(), TierIndex(MemoryIndex(), "disk"))


def _host(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    slab = Slab(BLOCK_BYTES, host_bytes(blocks))
    return HostTier("host", slab, LRU(), TierIndex(MemoryIndex(), "host"), lambda block: True)


def _disk(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    return disk_tier(tmp_path, blocks)


def _buffered_disk(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    monkeypatch.setattr(disk_module, "supports_direct_io", lambda directory: False)
    return disk_tier(tmp_path, blocks)


def _healthy_faulty(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    return FaultyTier(_host(blocks, tmp_path, monkeypatch), Faults(seed=1))


def _peer(blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    from peer_factories import ThroughAPeer

    return ThroughAPeer(blocks)


def _peer_by_nixl(blocks: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    pytest.importorskip("nixl", reason="NIXL is not installed", exc_type=ImportError)
    monkeypatch.setattr("peer_factories.FABRIC", True)
    return _peer(blocks, directory, monkeypatch)


TIERS: dict[str, Callable[[int, Path, pytest.MonkeyPatch], Tier]] = {
    "host": _host,
    "disk": _disk,
    "buffered-disk": _buffered_disk,
    "faulty-without-faults": _healthy_faulty,
    "peer": _peer,
    "peer-by-nixl": _peer_by_nixl,
}
"""Makes a tier of about so many blocks. A new tier joins the suite by one line here."""


@dataclass
class TierBench:
    """A tier and shorthands to use it by block number."""

    tier: Tier

    def store(self, number: int, data: Bytes | None = None) -> str:
        data = content(number) if data is None else data
        return self.tier.store(header_of(number, data), data)

    def load(self, number: int) -> Bytes | str:
        """The bytes found, or the reason why there are none."""
        out = blank()
        answer = self.tier.load(name(number), out)
        return out[: answer.stored_bytes] if isinstance(answer, BlockHeader) else answer
