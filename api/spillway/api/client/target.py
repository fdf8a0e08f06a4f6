"""Where a gateway is and how to get in: address, TLS, token. Clients and agents open their channels through this."""

from __future__ import annotations

import os
import random
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from spillway.api.errors import SpillwayError

TOKEN_VARIABLE = "SPILLWAY_TOKEN"  # noqa: S105 — the name of a variable, not a token
_TOKEN = re.compile(r"[!-~]*")
MAX_MESSAGE_BYTES = 64 << 20
"""As the gateway has it."""


class TargetError(SpillwayError):
    """The token or a TLS file cannot be used."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM. Without `authority` the system's are trusted; `certificate` and `key` say who we are."""

    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises TargetError if a file cannot be read, or only one of certificate and key is given."""
        if (self.certificate is None) != (self.key is None):
            raise TargetError("a client certificate goes with its key", "Give both, or neither.")
        return grpc.ssl_channel_credentials(_read(self.authority), _read(self.key), _read(self.certificate))


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway at "host:port"; or several over one data directory, separated by commas, of which any will do.

    The token is in `token_file`, else in the variable SPILLWAY_TOKEN, if anywhere.
    """

    address: str
    tls: Tls | None = None
    token_file: Path | None = None
    server_name: str | None = field(default=None)
    """The name that the gateway's certificate carries, where it is not the (first) one in `address`."""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What to send with a call. The file is read anew each time: Kubernetes changes tokens under way.

        Raises TargetError if the file cannot be read or holds something else.
        """
        if self.token_file is None:
            token = os.environ.get(TOKEN_VARIABLE, "")
        else:
            token = (_read(self.token_file) or b"").decode("ascii", "replace")
        token = token.strip()
        if not _TOKEN.fullmatch(token):
            where = self.token_file or f"the variable {TOKEN_VARIABLE}"
            raise TargetError(f"{where} holds no bearer token", "A token is one word of printable ASCII.")
        return (("authorization", f"Bearer {token}"),) if token else ()

    def channel(self) -> grpc.aio.Channel:
        """A channel with a connection of its own, which is made at the first call. Raises TargetError."""
        options: list[tuple[str, str | int]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 3000),
            ("grpc.use_local_subchannel_pool", 1),  # else a new channel would inherit a dead connection
        ]
        address, name = self.address, self.server_name
        if "," in address:
            first = address.partition(",")[0]
            address, name = _resolved(address), name or first.rpartition(":")[0].strip("[]")
            options.append(("grpc.default_authority", first))
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options)
        if name is not None:
            options.append(("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(address, self.tls.credentials(), options)


def _resolved(addresses: str) -> str:
    """Several addresses as gRPC knows them: by number, of one family. In any order, so that callers spread.

    Raises TargetError if none is known.
    """
    found: dict[int, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for address in addresses.split(","):
        host, _, port = address.strip().rpartition(":")
        try:
            places = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except OSError:  # one of them may be gone for good; those that are left will do
            continue
        for family, _, _, _, place in places:
            found[family].append(f"{place[0]}:{port}" if family == socket.AF_INET else f"[{place[0]}]:{port}")
    for scheme, family in (("ipv4", socket.AF_INET), ("ipv6", socket.AF_INET6)):
        known = list(dict.fromkeys(found[family]))
        if known:
            return f"{scheme}:{','.join(random.sample(known, len(known)))}"
    raise TargetError(f"no address is known of any of {addresses}", "Check the names.")


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise TargetError(f"{path} cannot be read: {error.strerror}") from error
