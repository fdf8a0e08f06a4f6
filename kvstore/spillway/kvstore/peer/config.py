"""Settings of the peer tier, both of its sides."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

from ..errors import ConfigError
from .fabric import nixl

SHORTEST_TOKEN_BYTES = 16
_MOST_CONNECTIONS = 1024


@dataclass(frozen=True, slots=True)
class PeersConfig:
    """How this node serves blocks to its peers and loads from them.

    ``token``: the secret all peers share; never sent. ``listen``: ``host:port`` of the block server (IPv6 in square
    brackets, port 0 for a free one), empty to serve nobody. ``server_tls``, ``client_tls``: contexts for TLS; require
    and present certificates there for mTLS. ``tls_name``: the name that peers' certificates carry, where it is not the
    host of their address. Without TLS peers prove that they know the token, but bytes in flight are readable, and
    protected against accident only.
    ``stall_s``: how long a peer may make no progress before it is given up; below the store's ``deadlines.load_s``.
    ``slowest_bytes_s``: a peer that takes a block more slowly is disconnected. ``connections``: most that are served
    at once. ``links_per_peer``: most that this node opens to one peer. ``fabric``: whether blocks' bytes go by NIXL
    where the other side has it too: for networks with RDMA, slower than sockets over TCP.
    """

    token: bytes = field(repr=False)
    listen: str = ""
    server_tls: ssl.SSLContext | None = None
    client_tls: ssl.SSLContext | None = None
    tls_name: str = ""
    stall_s: float = 0.5
    slowest_bytes_s: float = 10e6
    connections: int = 64
    links_per_peer: int = 4
    fabric: bool = False

    def __post_init__(self) -> None:
        """Raise `ConfigError` for settings that cannot work."""
        if len(self.token) < SHORTEST_TOKEN_BYTES:
            raise ConfigError(f"the token of peers needs at least {SHORTEST_TOKEN_BYTES} bytes, not {len(self.token)}")
        if self.listen:
            split_address(self.listen)
        for name in ("stall_s", "slowest_bytes_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, but is {getattr(self, name)}")
        if self.fabric:
            if self.server_tls or self.client_tls:
                raise ConfigError("fabric and TLS exclude each other: what goes by NIXL is not encrypted")
            nixl()
        for name in ("connections", "links_per_peer"):
            if not 1 <= getattr(self, name) <= _MOST_CONNECTIONS:
                raise ConfigError(f"{name} must be in 1 … {_MOST_CONNECTIONS}, but is {getattr(self, name)}")


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` as its two parts, an IPv6 host without its brackets. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise ConfigError(f"an address is host:port, not {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
