"""Settings of a store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConfigError
from .identity import KVIdentity


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long the store may keep a caller waiting.

    ``load_s`` plus the batch's bytes at ``slowest_bytes_s``: after that, blocks that have not come are misses.
    ``put_s``: how long one ``put_many`` waits for room. ``flush_s``: how long ``flush`` and ``close`` write.
    """

    load_s: float = 2.0
    slowest_bytes_s: float = 50e6
    put_s: float = 0.1
    flush_s: float = 120.0


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """What a store may use.

    ``block_bytes``: length of one block on the device; every buffer has it. ``identity``: whose blocks these are.
    ``host_bytes``: budget of the host tier, 0 for none. ``disk_bytes``: budget of ``disk_dir``, 0 for no disk tier; it
    belongs to the directory and is cut into ``disk_sharers`` equal shares, one per store that is open on it.
    ``disk_free_floor_bytes``: free space of the file system that the disk tier never grows into.
    ``staging_bytes``: host memory that holds blocks on their way to disk when there is no host tier.
    ``eviction``: ``lru`` or ``arc``.
    """

    block_bytes: int
    identity: KVIdentity
    host_bytes: int = 0
    disk_bytes: int = 0
    disk_dir: Path | None = None
    disk_sharers: int = 1
    disk_free_floor_bytes: int = 0
    staging_bytes: int = 64 << 20
    eviction: str = "lru"
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


_MOST = 99
