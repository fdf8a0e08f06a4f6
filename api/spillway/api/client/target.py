"""Where a gateway is and how to get in: address, TLS, token. Clients and agents open their channels through this."""

from __future__ import annotations

import os
import re
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
    """A gateway at "host:port". The token is in `token_file`, else in the variable SPILLWAY_TOKEN, if anywhere."""

    address: str
    tls: Tls | None = None
    token_file: Path | None = None
    server_name: str | None = field(default=None)
    """The name that the gateway's certificate carries, where it is not the one in `address`."""

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
        if self.tls is None:
            return grpc.aio.insecure_channel(self.address, options)
        if self.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        return grpc.aio.secure_channel(self.address, self.tls.credentials(), options)


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise TargetError(f"{path} cannot be read: {error.strerror}") from error
