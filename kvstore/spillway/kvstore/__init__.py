"""Blocks, hashes, tiers, index, eviction: KV cache that outgrows the device, verified on every load."""

from .config import Deadlines, StoreConfig
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
from .stats import StoreStats, TierStats
from .store import BlockStore

__all__ = [
    "BlockBufferError",
    "BlockHash",
    "BlockStore",
    "ConfigError",
    "ConservationError",
    "Deadlines",
    "KVIdentity",
    "KVStoreError",
    "MountBusyError",
    "MountError",
    "MountMismatchError",
    "StoreClosedError",
    "StoreConfig",
    "StoreStats",
    "TierStats",
    "TokenIdError",
    "block_hash",
]
