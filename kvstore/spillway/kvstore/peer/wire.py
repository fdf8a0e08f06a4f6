"""The frames between peers: fixed layouts, little-endian, every length bounded before a byte is allocated.

A connection: server HELLO, client AUTH, server WELCOME; then GET after GET, each answered by one BLOCK or MISS per
block, in the order asked. ORDER has the server do something with blocks, and is answered by a DONE. BAD tells the
server of a block that arrived damaged. REFUSED carries a code and ends it all. FABRIC asks for a way to read blocks by
NIXL, and is answered by one that says how, or is empty; from then on a block may be PLACED instead, which the client
answers by TAKEN once it has read it.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ..errors import PeerProtocolError
from ..header import HEADER_BYTES
from ..identity import HASH_BYTES, BlockHash
from ..outcomes import MissReason

VERSION = 1
MOST_BLOCKS = 256
"""Blocks in one GET."""
MOST_STORED_BYTES = 1 << 30
_MAGIC = b"SPWB"
_FRAME = struct.Struct("<4sBBHI")
"""magic, version, kind, code (a refusal, why there is a MISS, or what an ORDER wants), payload bytes."""
_GET = struct.Struct("<II")
"""request, milliseconds left; then the hashes. An ORDER has the same."""
_DONE = struct.Struct("<I")
"""request; then a `Result` per block, in the order asked."""
_ANSWER = struct.Struct("<II")
"""request, position; in a BLOCK then the block's header and its stored bytes."""
BLOCK_PREFIX_BYTES = _ANSWER.size + HEADER_BYTES
_PLACED = struct.Struct("<QQ")
PLACE_BYTES = _PLACED.size
"""In a PLACED, after the block's header: where in the server's memory its stored bytes are, and how many."""
_MOST_CARD_BYTES = 1 << 16


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    AUTH = 2
    WELCOME = 3
    REFUSED = 4
    GET = 5
    BLOCK = 6
    MISS = 7
    BAD = 8
    ORDER = 9
    DONE = 10
    FABRIC = 11
    PLACED = 12
    TAKEN = 13


class Verb(IntEnum):
    """What an ORDER wants done with blocks. CHECK: read and verify every copy. WARM: bring them to host memory."""

    CHECK = 1
    DROP = 2
    WARM = 3


class Result(IntEnum):
    """What became of a block under an ORDER. DONE: it is whole, dropped, or in host memory. DAMAGED: it was withdrawn.

    PENDING: it is on its way to host memory. FAILED: it could not be done now.
    """

    ABSENT = 0
    DONE = 1
    PENDING = 2
    FAILED = 3
    DAMAGED = 4


class Refusal(IntEnum):
    """Why a server ends a connection."""

    MALFORMED = 1
    VERSION = 2
    TOKEN = 3
    IDENTITY = 4
    GENERATION = 5
    BUSY = 6


NONCE_BYTES = 32
MAC_BYTES = 32
AUTH_BYTES = NONCE_BYTES + HASH_BYTES + 8 + MAC_BYTES
_BOUNDS: dict[Kind, tuple[int, int]] = {
    Kind.HELLO: (NONCE_BYTES, NONCE_BYTES),
    Kind.AUTH: (AUTH_BYTES, AUTH_BYTES),
    Kind.WELCOME: (MAC_BYTES, MAC_BYTES),
    Kind.REFUSED: (0, 0),
    Kind.GET: (_GET.size + HASH_BYTES, _GET.size + MOST_BLOCKS * HASH_BYTES),
    Kind.BLOCK: (BLOCK_PREFIX_BYTES, BLOCK_PREFIX_BYTES + MOST_STORED_BYTES),
    Kind.MISS: (_ANSWER.size, _ANSWER.size),
    Kind.BAD: (HASH_BYTES, HASH_BYTES),
    Kind.ORDER: (_GET.size + HASH_BYTES, _GET.size + MOST_BLOCKS * HASH_BYTES),
    Kind.DONE: (_DONE.size + 1, _DONE.size + MOST_BLOCKS),
    Kind.FABRIC: (0, _MOST_CARD_BYTES),
    Kind.PLACED: (BLOCK_PREFIX_BYTES + _PLACED.size, BLOCK_PREFIX_BYTES + _PLACED.size),
    Kind.TAKEN: (0, 0),
}
_MISSES = (
    MissReason.ABSENT,
    MissReason.DEADLINE,
    MissReason.BREAKER,
    MissReason.IO_ERROR,
    MissReason.CHECKSUM,
    MissReason.INTERNAL,
)
_MISS_CODES = {reason: code for code, reason in enumerate(_MISSES)}


@dataclass(frozen=True, slots=True)
class Frame:
    """The head of a frame. ``code``: a `Refusal`, why there is a MISS, or a `Verb`; 0 in all others."""

    kind: Kind
    code: int
    length: int


@dataclass(frozen=True, slots=True)
class Get:
    """A request for blocks, or about them, worth nothing after ``seconds``."""

    request: int
    seconds: float
    blocks: tuple[BlockHash, ...]

    def pack(self, verb: Verb | None = None) -> bytes:
        """The whole frame: a GET, or the ORDER to do something with the blocks."""
        milliseconds = min(0xFFFFFFFF, max(0, int(self.seconds * 1000)))
        payload = _GET.pack(self.request, milliseconds) + b"".join(self.blocks)
        return pack(Kind.GET, payload) if verb is None else pack(Kind.ORDER, payload, verb)


def pack(kind: Kind, payload: bytes = b"", code: int = 0, more_bytes: int = 0) -> bytes:
    """A frame, less the last ``more_bytes`` of its payload, which the caller sends after it."""
    return _FRAME.pack(_MAGIC, VERSION, kind, code, len(payload) + more_bytes) + payload


def pack_block(request: int, position: int, header: bytes, stored_bytes: int) -> bytes:
    """A BLOCK frame up to its stored bytes. ``header``: a packed `BlockHeader`."""
    return pack(Kind.BLOCK, _ANSWER.pack(request, position) + header, more_bytes=stored_bytes)


def pack_placed(request: int, position: int, header: bytes, place: tuple[int, int]) -> bytes:
    """A whole PLACED. ``place``: address and number of the stored bytes."""
    return pack(Kind.PLACED, _ANSWER.pack(request, position) + header + _PLACED.pack(*place))


def unpack_place(payload: bytes) -> tuple[int, int]:
    """Address and number of the stored bytes, from what follows the prefix of a PLACED."""
    start, length = _PLACED.unpack(payload)
    return start, length


def pack_miss(request: int, position: int, reason: MissReason) -> bytes:
    """A MISS frame; a reason that says nothing to a peer goes as INTERNAL."""
    code = _MISS_CODES.get(reason, _MISS_CODES[MissReason.INTERNAL])
    return pack(Kind.MISS, _ANSWER.pack(request, position), code)


def unpack_get(payload: bytes) -> Get:
    """Read a GET or an ORDER. Raises `PeerProtocolError` for a length that is no whole number of blocks."""
    if (len(payload) - _GET.size) % HASH_BYTES:
        raise PeerProtocolError("a GET ends within a hash")
    request, milliseconds = _GET.unpack_from(payload)
    starts = range(_GET.size, len(payload), HASH_BYTES)
    return Get(request, milliseconds / 1000, tuple(BlockHash(payload[at : at + HASH_BYTES]) for at in starts))


def unpack_answer(payload: bytes) -> tuple[int, int]:
    """Request and position of a BLOCK or MISS."""
    request, position = _ANSWER.unpack_from(payload)
    return request, position


def pack_done(request: int, results: Sequence[Result]) -> bytes:
    """A whole DONE."""
    return pack(Kind.DONE, _DONE.pack(request) + bytes(results))


def unpack_done(payload: bytes) -> tuple[int, list[Result]]:
    """Request and results of a DONE. Raises `PeerProtocolError`."""
    try:
        return _DONE.unpack_from(payload)[0], [Result(code) for code in payload[_DONE.size :]]
    except ValueError as error:
        raise PeerProtocolError("a DONE has an unknown result") from error


def packed_header(payload: bytes) -> bytes:
    """The block header in the prefix of a BLOCK."""
    return payload[_ANSWER.size : BLOCK_PREFIX_BYTES]


def miss_reason(code: int) -> MissReason:
    """Why a MISS is one. Raises `PeerProtocolError`."""
    if code >= len(_MISSES):
        raise PeerProtocolError(f"a MISS has the unknown code {code}")
    return _MISSES[code]


class Stream:
    """A connected socket, used by one thread. Every call ends by its ``deadline`` (monotonic), with TimeoutError.

    A connection that ends raises ConnectionError; any other trouble of the socket OSError.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._gathers = type(sock) is socket.socket  # a TLS socket has no sendmsg

    def receive_into(self, out: memoryview, deadline: float) -> None:
        """Fill ``out``."""
        while out.nbytes:
            self.socket.settimeout(_left(deadline))
            count = self.socket.recv_into(out)
            if count == 0:
                raise ConnectionResetError("the peer closed the connection")
            out = out[count:]

    def receive(self, length: int, deadline: float) -> bytes:
        """The next ``length`` bytes; the caller has bounded ``length``."""
        data = bytearray(length)
        self.receive_into(memoryview(data), deadline)
        return bytes(data)

    def head(self, allowed: Sequence[Kind], deadline: float) -> Frame:
        """The head of the next frame. Raises `PeerProtocolError` unless its kind is allowed and its length fits."""
        magic, version, number, code, length = _FRAME.unpack(self.receive(_FRAME.size, deadline))
        if magic != _MAGIC:
            raise PeerProtocolError("this is no frame")
        if version != VERSION:
            raise PeerProtocolError(f"version {version} is not spoken here", Refusal.VERSION)
        if number not in (*allowed, Kind.REFUSED):
            raise PeerProtocolError(f"a frame of kind {number} has no place here")
        kind = Kind(number)
        shortest, longest = _BOUNDS[kind]
        if not shortest <= length <= longest:
            raise PeerProtocolError(f"{length} bytes do not make a {kind.name}")
        return Frame(kind, code, length)

    def send(self, head: bytes, body: memoryview | None, deadline: float) -> None:
        """Send ``head``, then ``body``, which is not copied."""
        if body is not None and self._gathers:
            self.socket.settimeout(_left(deadline))
            sent = self.socket.sendmsg((head, body))
            self._send(memoryview(head)[sent:], deadline)
            self._send(body[max(0, sent - len(head)) :], deadline)
            return
        self._send(memoryview(head), deadline)
        if body is not None:
            self._send(body, deadline)

    def close(self) -> None:
        """Close the connection, whatever its state."""
        self.socket.close()

    def _send(self, data: memoryview, deadline: float) -> None:
        while data.nbytes:
            self.socket.settimeout(_left(deadline))
            data = data[self.socket.send(data) :]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the peer did not get on in time")
    return left
