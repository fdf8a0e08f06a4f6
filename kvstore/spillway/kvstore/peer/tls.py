"""TLS between peers: each shows a certificate of the same authority, as a server and as a client."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class PeerTls:
    """PEM files. ``name``: what all peers' certificates carry, where it is not the host of each one's address."""

    certificate: Path
    key: Path
    authority: Path
    name: str = ""

    def server(self) -> ssl.SSLContext:
        """Lets in only peers that show a certificate of the authority. Raises `ConfigError` for unusable files."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self) -> ssl.SSLContext:
        """Speaks only to peers with a certificate of the authority and the right name. Raises `ConfigError`."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except OSError as error:  # ssl.SSLError is one
            files = f"{self.certificate}, {self.key} and {self.authority}"
            raise ConfigError(f"the TLS files of peers, {files}, cannot be used: {error}") from error
        return context
