"""Settings of a store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .codecs.base import Codec
from .codecs.keys import KeyRing
from .codecs.quantized import QuantizedCodec
from .errors import ConfigError
from .eviction.arc import ARC
from .eviction.base import EvictionPolicy
from .eviction.lru import LRU
from .identity import KVIdentity
from .peer.config import PeersConfig
from .tiers.faulty import Faults

EVICTIONS = ("lru", "arc")
_MOST = 99


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the store may keep a caller waiting, in seconds.

    ``load_s`` plus the batch's bytes at ``slowest_bytes_s``: after that, blocks that have not come are misses.
    ``put_s``: how long one ``put_many`` waits for room. ``flush_s``: how long ``flush`` and ``close`` write.
    ``close_s``: how long ``close`` then waits for operations under way, before it takes the device for hung.
    """

    load_s: float = 2.0
    slowest_bytes_s: float = 50e6
    put_s: float = 0.25
    flush_s: float = 120.0
    close_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Codecs:
    """Lossy codecs per tier: ``none``, ``fp8``, ``int8`` or ``int4``.

    ``block_shape``: ``(layers, 2, kv_heads, block_tokens, head_dim)`` of one block, which a codec must know; its
    element type is the identity's ``kv_dtype``.
    """

    host: str = "none"
    disk: str = "none"
    block_shape: tuple[int, ...] = ()

    def build(self, dtype: str) -> tuple[Codec | None, Codec | None]:
        """The host's and the disk's codec; the same object where both are the same. Raises `ConfigError`."""
        built = {name: QuantizedCodec(name, self.block_shape, dtype) for name in {self.host, self.disk} - {"none"}}
        return built.get(self.host), built.get(self.disk)


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What a store may use.

    ``block_bytes``: length of one block on the device; every buffer has it. ``identity``: whose blocks these are.
    ``host_bytes``: budget of the host tier, 0 for none. ``disk_bytes``: budget of ``disk_dir``, 0 for no disk tier; it
    belongs to the directory and is cut into ``disk_sharers`` equal shares, one per store that is open on it.
    ``disk_free_floor_bytes``: free space of the file system that the disk tier never grows into.
    ``staging_bytes``: host memory that holds blocks on their way to disk when there is no host tier.
    ``eviction``: ``lru`` or ``arc``, for blocks that no plan knows. ``disk_keys``: encrypts the disk tier.
    ``disk_faults``: makes the disk tier misbehave, for tests and drills. ``peers``: serve other nodes and load
    from them, as the index locates blocks; needs an index that knows of other nodes to find any.
    """

    block_bytes: int
    identity: KVIdentity
    host_bytes: int = 0
    disk_bytes: int = 0
    disk_dir: Path | None = None
    disk_sharers: int = 1
    disk_free_floor_bytes: int = 1 << 30
    staging_bytes: int = 64 << 20
    eviction: str = "lru"
    codecs: Codecs = field(default_factory=Codecs)
    disk_keys: KeyRing | None = None
    disk_faults: Faults | None = None
    peers: PeersConfig | None = None
    read_threads: int = 4
    write_threads: int = 2
    deadlines: Deadlines = field(default_factory=Deadlines)

    def __post_init__(self) -> None:
        """Raise `ConfigError` for settings that cannot work together."""
        if self.block_bytes < 1:
            raise ConfigError(f"block_bytes must be at least 1, not {self.block_bytes}")
        for name in ("host_bytes", "disk_bytes", "disk_free_floor_bytes", "staging_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("disk_sharers", "read_threads", "write_threads"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise ConfigError(f"{name} must be in 1 … {_MOST}, but is {getattr(self, name)}")
        if (self.disk_bytes > 0) != (self.disk_dir is not None):
            raise ConfigError("a disk tier takes both disk_bytes and disk_dir")
        if not self.host_bytes and not self.disk_bytes:
            raise ConfigError("a store needs a tier: give host_bytes, or disk_bytes with disk_dir")
        if self.eviction not in EVICTIONS:
            raise ConfigError(f"no eviction policy {self.eviction!r}: choose one of {', '.join(EVICTIONS)}")

    def policy(self, capacity_blocks: int) -> EvictionPolicy:
        """A fresh policy of the configured kind for a tier of about ``capacity_blocks``."""
        return LRU() if self.eviction == "lru" else ARC(capacity_blocks)
