"""KV that agents share: the index in Redis, and a block server that others load from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spillway.kvstore import KVIdentity, PeersConfig
from spillway.kvstore.index.about import About
from spillway.kvstore.peer.tls import PeerTls

if TYPE_CHECKING:
    from spillway.kvstore.index.redis import RedisIndex


@dataclass(frozen=True, slots=True)
class SharingConfig:
    """`index_url`: the Redis, with password and TLS as redis-py reads them. `node`: unique among those that share it.

    `peer_listen`: "host:port" of the block server, empty to serve nobody; `peer_address`: where others reach it.
    `peer_token`: the secret that all peers share, 16 bytes or more. `metrics`: "host:port" of this agent's pages as
    people reach them, told to whoever asks the index about this node. `peer_fabric`: let blocks travel by NIXL.
    """

    index_url: str = field(repr=False)
    node: str
    peer_listen: str = ""
    peer_address: str = ""
    peer_token: bytes = field(default=b"", repr=False)
    peer_tls: PeerTls | None = None
    metrics: str = ""
    peer_fabric: bool = False


def open_shared(config: SharingConfig, identity: KVIdentity, block_bytes: int) -> tuple[RedisIndex, PeersConfig | None]:
    """The index, and how to serve and load blocks; no peers without a token. Does not wait for Redis.

    With Redis away peers get misses from this node, and it from them, until it is back.

    Raises:
        ConfigError: the settings cannot work, or the TLS files cannot be used.
    """
    # A run of its own never needs Redis, whose client is slow to load.
    from spillway.kvstore.index.redis import RedisIndex
    from spillway.kvstore.index.redis_client import RedisConfig

    about = About(
        identity=identity.digest().hex(),
        weights=identity.weights_digest,
        dtype=identity.kv_dtype,
        rank=f"{identity.tensor_rank}/{identity.tensor_size}",
        block_bytes=block_bytes,
        metrics=config.metrics,
    )
    peers, tls = None, config.peer_tls
    if config.peer_token:
        peers = PeersConfig(
            token=config.peer_token,
            listen=config.peer_listen,
            server_tls=tls.server() if tls else None,
            client_tls=tls.client() if tls else None,
            tls_name=tls.name if tls else "",
            fabric=config.peer_fabric,
        )
    return RedisIndex(RedisConfig(config.index_url, config.node, config.peer_address, about), identity.digest()), peers
