"""Calls to Redis that never raise for its troubles and never last: they answer, or say that there is no answer."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import NoScriptError, RedisClusterException, RedisError
from redis.retry import Retry

from ..errors import ConfigError
from ..transfer.breaker import Breaker
from .about import About
from .redis_scripts import sha_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RedisConfig:
    """How a node reaches the index, and under which name it enters its blocks.

    ``url``: ``redis://`` or, with TLS, ``rediss://``, with user and password of the ACL if there are any:
    ``rediss://user:password@host:6379/0?ssl_ca_certs=/etc/ca.pem``; ``redis+cluster://`` or ``rediss+cluster://`` where
    it names one node of a Redis Cluster. ``node``: this node's name, its own among all that share the index;
    ``address``: ``host:port`` of its block server; ``about``: what people are told of it.
    ``lease_s``: how long after its last sign of life a node's blocks are still believed to be there.
    ``timeout_s``: the longest that one call may take. ``near_s``: how long an answer is used again.
    ``most_changes``: queued changes beyond which all of them are dropped and a whole snapshot is published later.
    """

    url: str = field(repr=False)
    node: str
    address: str = ""
    about: About = field(default_factory=About)
    prefix: str = "spillway"
    lease_s: float = 10.0
    timeout_s: float = 0.25
    near_s: float = 1.0
    near_blocks: int = 100_000
    most_changes: int = 200_000
    buckets: int = 16384

    def __post_init__(self) -> None:
        """Raise `ConfigError` for settings that cannot work."""
        if not self.node or any(mark in self.node + self.address for mark in "|{}\n"):
            raise ConfigError(f"node must be a name, and address host:port, without | {{ }}: {self.node!r}")
        if not 0 < self.timeout_s < self.lease_s / 3:
            raise ConfigError(f"timeout_s must be above 0 and below a third of lease_s, but is {self.timeout_s}")
        if self.buckets < 1 or self.most_changes < 1 or self.near_blocks < 0 or self.near_s < 0:
            raise ConfigError("buckets and most_changes must be at least 1, near_blocks and near_s at least 0")


class RedisCalls:
    """Runs scripts. A call that fails or is late counts against a breaker, which pauses all calls, longer each time.

    The client connects anew by itself and does not repeat a call: what became of one that failed is not known.
    """

    def __init__(self, config: RedisConfig) -> None:
        """Raises `ConfigError` for a URL that is none. Connects with the first call."""
        self._config = config
        self.breaker = Breaker(threshold=2, first_pause_s=0.2, longest_pause_s=5.0)
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._client: Any = None
        try:
            # A cluster's client asks its nodes at once, so it waits for the first call; the URL is tried here.
            ConnectionPool.from_url(plain_url(config.url)[0])
            if not plain_url(config.url)[1]:
                self._client = self._connect()
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the URL of the Redis index cannot be used: {error}") from None

    def script(self, source: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """The script's answer; None if there is none: Redis is away, late or refuses. All keys have one hash tag."""
        return self._call("evalsha", (source, keys, arguments))

    def command(self, name: str, *arguments: Any) -> Any:
        """A plain command's answer; None as for `script`."""
        return self._call(name, arguments)

    def _call(self, name: str, arguments: Sequence[Any]) -> Any:
        if not self.breaker.allow():
            self._count("breaker")
            return None
        try:
            client = self._ready()
            answer = _evaluate(client, *arguments) if name == "evalsha" else client.execute_command(name, *arguments)
        except (RedisError, RedisClusterException, OSError) as error:
            self._count("failed")
            self.breaker.failure()
            _log.debug("the Redis index did not answer: %s", type(error).__name__)
            return None
        self.breaker.success()
        self._count("answered")
        return answer

    def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            self._client.close()

    def _ready(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        return connect(self._config.url, self._config.timeout_s)

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1


def plain_url(url: str) -> tuple[str, bool]:
    """``url`` as redis-py knows it, and whether it names a node of a Redis Cluster."""
    scheme, separator, rest = url.partition("://")
    return scheme.removesuffix("+cluster") + separator + rest, scheme.endswith("+cluster")


def connect(url: str, timeout_s: float) -> Any:
    """A client that waits no longer than ``timeout_s`` for anything and repeats nothing.

    Raises ValueError for a URL that is none; a cluster's client calls it at once and raises what its calls do.
    """
    plain, cluster = plain_url(url)
    kind = RedisCluster if cluster else Redis
    return kind.from_url(
        plain, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2
    )


def _evaluate(client: Any, source: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
    try:
        return client.evalsha(sha_of(source), len(keys), *keys, *arguments)
    except NoScriptError:
        return client.eval(source, len(keys), *keys, *arguments)
