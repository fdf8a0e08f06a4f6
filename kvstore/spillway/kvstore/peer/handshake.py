"""Both sides prove that they know the token, and agree on identity and generation, before a block is named.

Each sends a fresh nonce, and a MAC under the token over both nonces, identity, generation and its own role: a recorded
exchange cannot be replayed, and a MAC cannot be reflected.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field

from ..errors import PeerProtocolError, PeerRefusedError
from ..identity import HASH_BYTES
from .wire import MAC_BYTES, NONCE_BYTES, Kind, Refusal, Stream, pack


@dataclass(frozen=True, slots=True)
class Credentials:
    """What both sides must hold alike. ``identity``: digest of the blocks' identity, 32 bytes."""

    token: bytes = field(repr=False)
    identity: bytes
    generation: int

    def mac(self, role: bytes, nonces: bytes) -> bytes:
        """HMAC-SHA256 over role, nonces, identity and generation."""
        message = b"spillway.kv.peer" + role + nonces + self.identity + self.generation.to_bytes(8, "little")
        return hmac.digest(self.token, message, "sha256")


def admit(stream: Stream, own: Credentials, deadline: float) -> None:
    """The server's side. Raises `PeerProtocolError` with the code to refuse with, and the stream's errors."""
    server_nonce = secrets.token_bytes(NONCE_BYTES)
    stream.send(pack(Kind.HELLO, server_nonce), None, deadline)
    payload = _receive(stream, Kind.AUTH, deadline)
    client_nonce, rest = payload[:NONCE_BYTES], payload[NONCE_BYTES:]
    identity, generation = rest[:HASH_BYTES], int.from_bytes(rest[HASH_BYTES : HASH_BYTES + 8], "little")
    nonces = server_nonce + client_nonce
    claimed = Credentials(own.token, identity, generation)
    if not hmac.compare_digest(rest[-MAC_BYTES:], claimed.mac(b"client", nonces)):
        raise PeerProtocolError("a peer does not know the token", Refusal.TOKEN)
    if identity != own.identity:
        raise PeerProtocolError("a peer has blocks of another identity", Refusal.IDENTITY)
    if generation != own.generation:
        raise PeerProtocolError("a peer expects another generation of this node", Refusal.GENERATION)
    stream.send(pack(Kind.WELCOME, own.mac(b"server", nonces)), None, deadline)


def introduce(stream: Stream, wanted: Credentials, deadline: float) -> None:
    """The client's side. Raises `PeerRefusedError`, `PeerProtocolError` and the stream's errors."""
    server_nonce = _receive(stream, Kind.HELLO, deadline)
    client_nonce = secrets.token_bytes(NONCE_BYTES)
    nonces = server_nonce + client_nonce
    generation = wanted.generation.to_bytes(8, "little")
    auth = client_nonce + wanted.identity + generation + wanted.mac(b"client", nonces)
    stream.send(pack(Kind.AUTH, auth), None, deadline)
    if not hmac.compare_digest(_receive(stream, Kind.WELCOME, deadline), wanted.mac(b"server", nonces)):
        raise PeerProtocolError("the server does not know the token", Refusal.TOKEN)


def refused(code: int) -> PeerRefusedError:
    """The error for a REFUSED frame."""
    name = next((refusal.name.lower() for refusal in Refusal if refusal == code), f"code {code}")
    return PeerRefusedError(f"the peer refuses: {name}", code)


def _receive(stream: Stream, kind: Kind, deadline: float) -> bytes:
    frame = stream.head((kind,), deadline)
    if frame.kind is Kind.REFUSED:
        raise refused(frame.code)
    return stream.receive(frame.length, deadline)
