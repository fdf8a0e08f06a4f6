"""The secret and the certificates of agents among themselves, as options give them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spillway.api.errors import SpillwayError

if TYPE_CHECKING:
    from spillway.kvstore.peer.tls import PeerTls


class PeerUsageError(SpillwayError):
    """Options about peers that do not go together, or files that cannot be read."""


@dataclass(frozen=True, slots=True)
class PeerSecrets:
    """Files; None where nothing was said."""

    token: Annotated[
        Path | None,
        typer.Option(
            "--peer-token-file", help="File with the secret that agents share among themselves, 16 bytes or more."
        ),
    ] = None
    certificate: Annotated[
        Path | None,
        typer.Option("--peer-tls-cert", help="Certificate that we show to agents' block servers, PEM."),
    ] = None
    key: Annotated[Path | None, typer.Option("--peer-tls-key", help="Its private key, PEM.")] = None
    authority: Annotated[
        Path | None,
        typer.Option(
            "--peer-tls-ca", help="The authority that certifies all agents' block servers and their callers, PEM."
        ),
    ] = None
    name: Annotated[
        str,
        typer.Option(
            "--peer-tls-name", help="The name in those certificates. Default: the host of each agent's address."
        ),
    ] = ""

    def read_token(self) -> bytes:
        """The secret; empty without a file. Raises PeerUsageError."""
        if self.token is None:
            if any((self.certificate, self.key, self.authority, self.name)):
                raise PeerUsageError("TLS between agents comes on top of their secret", "Give --peer-token-file.")
            return b""
        try:
            return self.token.read_bytes().strip()
        except OSError as error:
            raise PeerUsageError(f"{self.token} cannot be read: {error.strerror}") from error

    def tls(self) -> PeerTls | None:
        """None without certificates. Raises PeerUsageError."""
        from spillway.kvstore.peer.tls import PeerTls

        if self.certificate and self.key and self.authority:
            return PeerTls(self.certificate, self.key, self.authority, self.name)
        if any((self.certificate, self.key, self.authority, self.name)):
            raise PeerUsageError(
                "TLS between agents takes a certificate, its key and the authority of all of them",
                "Give --peer-tls-cert, --peer-tls-key and --peer-tls-ca.",
            )
        return None
