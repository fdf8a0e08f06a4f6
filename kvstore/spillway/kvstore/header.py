"""The header of a block outside the device: what its stored bytes are."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from .buffers import Bytes
from .identity import HASH_BYTES, BlockHash

CODEC_DATA_BYTES = 16
_MAGIC = b"SPWKVBLK"
_VERSION = 1
_FIELDS = struct.Struct(f"<8sHHIQ{HASH_BYTES}s{HASH_BYTES}sQQQ{CODEC_DATA_BYTES}s")
"""magic, version, codec, key id, sequence, block, identity, raw bytes, stored bytes, checksum, codec data."""
_CHECK = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _CHECK.size
"""Packed size of a header, its own checksum included."""


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a tier keeps beside a block's bytes.

    ``raw_bytes``: length on the device; ``stored_bytes``: length in this tier, after codec and cipher.
    ``checksum``: xxh3-64 of the stored bytes. ``codec``: the codec's number. ``key_id``: of the key it is encrypted
    under, 0 for none; ``codec_data``: the cipher's nonce, `CODEC_DATA_BYTES` long.
    """

    block: BlockHash
    identity: bytes
    raw_bytes: int
    stored_bytes: int
    checksum: int
    codec: int = 0
    key_id: int = 0
    codec_data: bytes = bytes(CODEC_DATA_BYTES)

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
