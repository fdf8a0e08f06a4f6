"""Blocks, hashes, tiers, index, eviction: KV cache that outgrows the device, verified on every load."""

from .codecs.keys import KeyRing
from .config import Codecs, Deadlines, StoreConfig
from .errors import (
    BlockBufferError,
    ConfigError,
    ConservationError,
    KVStoreError,
    MountBusyError,
    MountError,
    MountMismatchError,
    StoreClosedError,
    TokenIdError,
)
from .identity import BlockHash, KVIdentity, block_hash
from .peer.config import PeersConfig
from .planning.job_plan import JobPlan
from .stats import StoreStats, TierStats
from .store import BlockStore
from .tiers.faulty import Faults

__all__ = [
    "BlockBufferError",
    "BlockHash",
    "BlockStore",
    "Codecs",
    "ConfigError",
    "ConservationError",
    "Deadlines",
    "Faults",
    "JobPlan",
    "KVIdentity",
    "KVStoreError",
    "KeyRing",
    "MountBusyError",
    "MountError",
    "MountMismatchError",
    "PeersConfig",
    "StoreClosedError",
    "StoreConfig",
    "StoreStats",
    "TierStats",
    "TokenIdError",
    "block_hash",
]
