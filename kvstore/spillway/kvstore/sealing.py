"""A block outside the device: its header, and the one place where a loaded block is verified.

A header says what the bytes are; ``verify`` holds it and the bytes against what was asked for, on every load from every
tier. The checksum is taken once, from the bytes the caller put, and travels with the block from tier to tier, so damage
on the way (a bad copy, a bad host page, a bad disk sector) is found wherever the block is loaded from in the end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

import xxhash

from .buffers import Bytes
from .identity import HASH_BYTES, BlockHash

_MAGIC = b"SPWKVBLK"
_VERSION = 1
_FIELDS = struct.Struct(f"<8sHHIQ{HASH_BYTES}s{HASH_BYTES}sQQQ48s")
"""magic, version, codec, key id, sequence, block, identity, raw bytes, stored bytes, checksum, codec's own data."""
_CHECK = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _CHECK.size
"""Packed size of a header, its own checksum included."""
CODEC_DATA_BYTES = 48


class MissReason(StrEnum):
    """Why a load gave no block."""

    ABSENT = "absent"
    HEADER = "header"
    IDENTITY = "identity"
    LENGTH = "length"
    CHECKSUM = "checksum"
    SHORT_READ = "short_read"
    IO_ERROR = "io_error"
    DEADLINE = "deadline"
    BREAKER = "breaker"
    CANCELLED = "cancelled"

    @property
    def damaged(self) -> bool:
        """Whether the entry that was found is no good and has to be withdrawn."""
        return self in _DAMAGED


_DAMAGED = frozenset(
    {
        MissReason.HEADER,
        MissReason.IDENTITY,
        MissReason.LENGTH,
        MissReason.CHECKSUM,
        MissReason.SHORT_READ,
        MissReason.IO_ERROR,
    }
)


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a tier keeps beside a block's bytes.

    ``raw_bytes``: length as the device holds it; ``stored_bytes``: length as this tier holds it, after ``codec``.
    ``checksum``: xxh3-64 of the stored bytes. ``key_id`` and ``codec_data`` belong to the codec.
    """

    block: BlockHash
    identity: bytes
    raw_bytes: int
    stored_bytes: int
    checksum: int
    codec: int = 0
    key_id: int = 0
    codec_data: bytes = b""

    def pack(self, sequence: int) -> bytes:
        """`HEADER_BYTES` bytes; ``sequence`` orders all writes to one place, so that an older header can be told."""
        head = _FIELDS.pack(
            _MAGIC,
            _VERSION,
            self.codec,
            self.key_id,
            sequence,
            self.block,
            self.identity,
            self.raw_bytes,
            self.stored_bytes,
            self.checksum,
            self.codec_data,
        )
        return head + _CHECK.pack(xxhash.xxh3_64_intdigest(head))


def unpack(data: bytes) -> tuple[BlockHeader, int] | None:
    """Read back a packed header and its sequence number; None if it is empty, torn or of another version."""
    if len(data) < HEADER_BYTES or data[: len(_MAGIC)] != _MAGIC:
        return None
    head = data[: _FIELDS.size]
    if _CHECK.unpack_from(data, _FIELDS.size)[0] != xxhash.xxh3_64_intdigest(head):
        return None
    _, version, codec, key_id, sequence, block, identity, raw, stored, checksum, codec_data = _FIELDS.unpack(head)
    if version != _VERSION:
        return None
    header = BlockHeader(BlockHash(block), identity, raw, stored, checksum, codec, key_id, codec_data)
    return header, sequence


def checksum_of(data: Bytes) -> int:
    """xxh3-64 of ``data``; releases the interpreter lock."""
    return xxhash.xxh3_64_intdigest(data.data)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a loaded block must be."""

    block: BlockHash
    identity: bytes
    raw_bytes: int


def verify(header: BlockHeader, stored: Bytes, expected: Expected) -> MissReason | None:
    """Hold a loaded block against what was asked for; None if it is that block, whole and undamaged.

    ``stored`` is the buffer the tier loaded into: its first ``header.stored_bytes`` bytes are the block.
    """
    if header.block != expected.block:
        return MissReason.HEADER
    if header.identity != expected.identity:
        return MissReason.IDENTITY
    if header.raw_bytes != expected.raw_bytes or header.stored_bytes > stored.nbytes:
        return MissReason.LENGTH
    if checksum_of(stored[: header.stored_bytes]) != header.checksum:
        return MissReason.CHECKSUM
    return None
