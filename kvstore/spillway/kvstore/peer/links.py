"""Connections to peers: opened when needed, kept while idle, given up after trouble."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..buffers import Bytes, copy
from ..errors import PeerProtocolError
from ..header import BlockHeader, unpack
from ..identity import BlockHash
from ..outcomes import MissReason
from ..transfer.breaker import Breaker
from .config import PeersConfig, split_address
from .fabric import Landing
from .handshake import Credentials, introduce, refused
from .wire import (
    BLOCK_PREFIX_BYTES,
    PLACE_BYTES,
    Get,
    Kind,
    Result,
    Stream,
    Verb,
    miss_reason,
    pack,
    packed_header,
    unpack_answer,
    unpack_done,
    unpack_place,
)

Arrived = Callable[[int, BlockHeader | MissReason], bool]
"""Told of each block by its position in the request, in order; False to stop there."""
_HANDSHAKE_STALLS = 4
"""A handshake takes several round trips and a few hashes: so many stalls are allowed for it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A block server, as the index names it."""

    node: str
    generation: int
    address: str


class Link:
    """One authenticated connection, used by one thread at a time."""

    def __init__(self, peer: Peer, config: PeersConfig, identity: bytes, deadline: float) -> None:
        """Connect. Raises OSError, `PeerRefusedError`, `PeerProtocolError`."""
        self._config = config
        self._requests = itertools.count()
        self._landing: Landing | None = None
        host, port = split_address(peer.address)
        connection = socket.create_connection((host, port), timeout=_until(deadline, config.stall_s))
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            until = min(deadline, time.monotonic() + _HANDSHAKE_STALLS * config.stall_s)
            if config.client_tls is not None:
                connection.settimeout(_until(until, _HANDSHAKE_STALLS * config.stall_s))
                connection = config.client_tls.wrap_socket(connection, server_hostname=config.tls_name or host)
            self._stream = Stream(connection)
            introduce(self._stream, Credentials(config.token, identity, peer.generation), until)
            self._card = self._join(until) if config.fabric else b""
        except BaseException:
            connection.close()
            raise

    def get(self, blocks: Sequence[BlockHash], buffer: Bytes, deadline: float, arrived: Arrived) -> bool:
        """Ask for ``blocks`` at once; each lands at the start of ``buffer`` before ``arrived`` is told.

        False if ``arrived`` stopped it: the connection is then of no further use. Raises OSError,
        `PeerProtocolError`, `PeerRefusedError`.
        """
        request = next(self._requests) & 0xFFFFFFFF
        get = Get(request, deadline - time.monotonic(), tuple(blocks))
        self._stream.send(get.pack(), None, self._patience(0, deadline))
        for position in range(len(blocks)):
            frame = self._stream.head((Kind.BLOCK, Kind.PLACED, Kind.MISS), self._patience(0, deadline))
            if frame.kind is Kind.REFUSED:
                raise refused(frame.code)
            prefix_bytes = frame.length if frame.kind is Kind.MISS else BLOCK_PREFIX_BYTES
            prefix = self._stream.receive(prefix_bytes, self._patience(0, deadline))
            if unpack_answer(prefix) != (request, position):
                raise PeerProtocolError("an answer came out of turn")
            answer: BlockHeader | MissReason
            if frame.kind is Kind.BLOCK:
                answer = self._receive_block(prefix, frame.length - prefix_bytes, buffer, deadline)
            elif frame.kind is Kind.PLACED:
                answer = self._read_block(prefix, buffer, deadline)
            else:
                answer = miss_reason(frame.code)
            if not arrived(position, answer):
                return position == len(blocks) - 1
        return True

    def report(self, block: BlockHash) -> None:
        """Tell the peer that ``block`` arrived damaged. Raises OSError."""
        self._stream.send(pack(Kind.BAD, block), None, time.monotonic() + self._config.stall_s)

    def order(self, verb: Verb, blocks: Sequence[BlockHash], deadline: float) -> list[Result]:
        """Have the peer do something with ``blocks``, `MOST_BLOCKS` at most; what became of each.

        Raises OSError, `PeerProtocolError`, `PeerRefusedError`.
        """
        request = next(self._requests) & 0xFFFFFFFF
        # The answer is one frame, after all the work: the peer is told to stop early enough to send it.
        order = Get(request, deadline - time.monotonic() - self._config.stall_s, tuple(blocks))
        self._stream.send(order.pack(verb), None, self._patience(0, deadline))
        frame = self._stream.head((Kind.DONE,), deadline)
        if frame.kind is Kind.REFUSED:
            raise refused(frame.code)
        answered, results = unpack_done(self._stream.receive(frame.length, deadline))
        if answered != request or len(results) != len(blocks):
            raise PeerProtocolError("an answer came out of turn")
        return results

    def close(self) -> None:
        """Cut the connection."""
        self._stream.close()
        landing, self._landing = self._landing, None
        if landing is not None:
            landing.close()

    def _join(self, deadline: float) -> bytes:
        self._stream.send(pack(Kind.FABRIC), None, deadline)
        frame = self._stream.head((Kind.FABRIC,), deadline)
        if frame.kind is Kind.REFUSED:
            raise refused(frame.code)
        return self._stream.receive(frame.length, deadline)

    def _receive_block(self, prefix: bytes, length: int, buffer: Bytes, deadline: float) -> BlockHeader:
        if length > buffer.nbytes:
            raise PeerProtocolError(f"a block of {length} bytes is larger than a block of this store")
        self._stream.receive_into(buffer[:length].data, self._patience(length, deadline))
        return _header_of(prefix, length)

    def _read_block(self, prefix: bytes, buffer: Bytes, deadline: float) -> BlockHeader:
        start, length = unpack_place(self._stream.receive(PLACE_BYTES, self._patience(0, deadline)))
        if not self._card or length > buffer.nbytes:
            raise PeerProtocolError(f"a block of {length} bytes was placed where none is expected")
        if self._landing is None:
            self._landing = Landing(self._card, buffer.nbytes)
        copy(buffer[:length], self._landing.read(start, length, self._patience(length, deadline)))
        self._stream.send(pack(Kind.TAKEN), None, self._patience(0, deadline))
        return _header_of(prefix, length)

    def _patience(self, length: int, deadline: float) -> float:
        return min(deadline, time.monotonic() + self._config.stall_s + length / self._config.slowest_bytes_s)


@dataclass(slots=True)
class _Place:
    """What is kept of one peer."""

    breaker: Breaker = field(default_factory=Breaker)
    idle: list[Link] = field(default_factory=list)
    taken: int = 0


class LinkPool:
    """Up to ``config.links_per_peer`` connections to each peer. Thread-safe."""

    def __init__(self, config: PeersConfig, identity: bytes) -> None:
        self._config = config
        self._identity = identity
        self._changed = threading.Condition()
        self._places: dict[Peer, _Place] = {}
        self._closed = False

    def breaker(self, peer: Peer) -> Breaker:
        """The breaker of one peer: a dead one must not cost the others."""
        with self._changed:
            return self._places.setdefault(peer, _Place()).breaker

    def take(self, peer: Peer, deadline: float) -> Link:
        """A connection of the caller's own until `give` or `discard`.

        Raises OSError (TimeoutError at ``deadline``), `PeerRefusedError`, `PeerProtocolError`.
        """
        with self._changed:
            place = self._places.setdefault(peer, _Place())
            free = self._changed.wait_for(
                lambda: self._closed or place.taken < self._config.links_per_peer, max(0.0, deadline - time.monotonic())
            )
            if not free or self._closed:
                raise TimeoutError("no connection to the peer came free in time")
            place.taken += 1
            if place.idle:
                return place.idle.pop()
        try:
            return Link(peer, self._config, self._identity, deadline)
        except BaseException:
            self._release(place)
            raise

    def give(self, peer: Peer, link: Link) -> None:
        """Hand back a connection that is at rest."""
        with self._changed:
            place = self._places[peer]
            if self._closed:
                link.close()
            else:
                place.idle.append(link)
        self._release(place)

    def discard(self, peer: Peer, link: Link) -> None:
        """Cut a connection; idle ones to the same peer go with it, as they will have died of the same cause."""
        link.close()
        with self._changed:
            place = self._places[peer]
            idle, place.idle = place.idle, []
        for other in idle:
            other.close()
        self._release(place)

    def counts(self) -> tuple[int, int]:
        """Connections idle and taken, over all peers."""
        with self._changed:
            return (
                sum(len(place.idle) for place in self._places.values()),
                sum(place.taken for place in self._places.values()),
            )

    def forget(self, keep: Callable[[Peer], bool]) -> None:
        """Cut the idle connections of peers that ``keep`` says are gone, and forget those peers."""
        with self._changed:
            gone = [peer for peer, place in self._places.items() if not place.taken and not keep(peer)]
            links = [link for peer in gone for link in self._places.pop(peer).idle]
        for link in links:
            link.close()

    def close(self) -> None:
        """Cut what is idle; what is taken is cut when it comes back."""
        with self._changed:
            self._closed = True
            links = [link for place in self._places.values() for link in place.idle]
            for place in self._places.values():
                place.idle.clear()
            self._changed.notify_all()
        for link in links:
            link.close()

    def _release(self, place: _Place) -> None:
        with self._changed:
            place.taken -= 1
            self._changed.notify()


def _header_of(prefix: bytes, length: int) -> BlockHeader:
    unpacked = unpack(packed_header(prefix))
    if unpacked is None or unpacked[0].stored_bytes != length:
        raise PeerProtocolError("a block came without a sound header")
    return unpacked[0]


def _until(deadline: float, most_s: float) -> float:
    left = min(most_s, deadline - time.monotonic())
    if left <= 0:
        raise TimeoutError("no time is left to reach the peer")
    return left
