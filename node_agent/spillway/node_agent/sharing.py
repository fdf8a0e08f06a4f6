"""KV that agents share: the index in Redis, and a block server that others load from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from spillway.kvstore import KVIdentity, PeersConfig
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig

log = logging.getLogger(__name__)

FIRST_CONTACT_S = 10.0


@dataclass(frozen=True, slots=True)
class SharingConfig:
    """`index_url`: the Redis, with password and TLS as redis-py reads them. `node`: unique among those that share it.

    `peer_listen`: "host:port" of the block server, empty to serve nobody; `peer_address`: where others reach it.
    `peer_token`: the secret that all peers share, 16 bytes or more.
    """

    index_url: str = field(repr=False)
    node: str
    peer_listen: str = ""
    peer_address: str = ""
    peer_token: bytes = field(default=b"", repr=False)


def open_shared(config: SharingConfig, identity: KVIdentity) -> tuple[RedisIndex, PeersConfig | None]:
    """The index, and how to serve and load blocks; no peers without a token.

    A block server has the generation that the index gave this node at its start. With Redis away for `FIRST_CONTACT_S`,
    or a new generation later, peers get misses from this node, and it still loads from them.

    Raises:
        ConfigError: the settings cannot work.
    """
    index = RedisIndex(RedisConfig(config.index_url, config.node, config.peer_address), identity.digest())
    if not config.peer_token:
        return index, None
    if not index.settle(FIRST_CONTACT_S):
        log.warning("the index in Redis has not answered; other agents cannot load blocks from this one")
    generation = index.stats().generation
    try:
        return index, PeersConfig(token=config.peer_token, listen=config.peer_listen, generation=generation)
    except BaseException:
        index.close()
        raise
