"""The secret and the certificates of agents among themselves, as options give them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spillway.api.errors import SpillwayError

if TYPE_CHECKING:
    from spillway.kvstore.peer.tls import PeerTls


class PeerUsageError(SpillwayError):
    """Options about peers that do not go together, or files that cannot be read."""


@dataclass(frozen=True, slots=True)
class PeerSecrets:
    """Files; None where nothing was said."""

    token: Path | None
    certificate: Path | None
    key: Path | None
    authority: Path | None
    name: str

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
