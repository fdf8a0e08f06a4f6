"""Records of the result log: how one is written, read back, and found again after damage.

A record is

    magic 4 · payload bytes u32 · line index u32 · kind u32 · header checksum u64 · payload checksum u64 · payload

in little-endian, with xxh3-64 checksums seeded by the log's own key, so that a record of another log, or an image of
one inside a payload, is never taken for ours. The header has a checksum of its own: where only the payload is damaged
the length still holds, and where the header is damaged the reader looks for the next whole header.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO, NamedTuple

import xxhash

FILE_HEADER_BYTES = 16
_FILE_HEADER = struct.Struct("<8sQ")
_FILE_MAGIC = b"SPWLOG01"
MAGIC = b"\xf5Spw"
HEADER_BYTES = 32
_START = struct.Struct("<4sIII")
_CHECKSUMS = struct.Struct("<QQ")
_HEADER = struct.Struct("<4sIIIQQ")
_SEARCH_BYTES = 1024 * 1024
_USUAL_BYTES = 2048  # most payloads are read with their header


class RecordKind(IntEnum):
    """What a record says about its line."""

    RESULT = 1
    ERROR = 2


_KINDS = {int(kind): kind for kind in RecordKind}
_ERROR = int(RecordKind.ERROR)


@dataclass(frozen=True, slots=True)
class Record:
    """A whole record. `payload` is the line's row of the output file, newline included, or its LineError as JSON."""

    index: int
    kind: RecordKind
    payload: bytes


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes [start, stop) of a log: a record, or damage where `record` is None."""

    start: int
    stop: int
    record: Record | None


@dataclass(frozen=True, slots=True)
class RecordRun:
    """Whole records one behind the other. `errors` are the places of those of kind ERROR; `stop`: bytes they take."""

    indices: list[int]
    payloads: list[memoryview]
    errors: list[int]
    stop: int


class _Header(NamedTuple):
    payload_bytes: int
    line_index: int
    kind: RecordKind
    payload_checksum: int


def file_header(key: int) -> bytes:
    """What a log begins with."""
    return _FILE_HEADER.pack(_FILE_MAGIC, key)


def encode(record: Record, key: int) -> bytes:
    """The record as it stands in the log."""
    start = _START.pack(MAGIC, len(record.payload), record.index, record.kind)
    return b"".join((start, _CHECKSUMS.pack(_checksum(start, key), _checksum(record.payload, key)), record.payload))


def read_at(descriptor: int, offset: int, key: int) -> Record | None:
    """The record at an offset, or None if what stands there is not a whole one."""
    start = os.pread(descriptor, HEADER_BYTES + _USUAL_BYTES, offset)
    header = _decode_header(start, key)
    if header is None:
        return None
    payload = start[HEADER_BYTES : HEADER_BYTES + header.payload_bytes]
    if len(payload) < header.payload_bytes:
        payload += os.pread(descriptor, header.payload_bytes - len(payload), offset + HEADER_BYTES + len(payload))
    return _verified(header, payload, key)


def whole_records(piece: bytes, key: int) -> RecordRun:
    """The records at the start of a piece of a log, up to one that is damaged or not all there.

    Streams of results are made of this: two checksums and a few slices a record, and nothing copied.
    """
    indices: list[int] = []
    payloads: list[memoryview] = []
    errors: list[int] = []
    view, digest, position = memoryview(piece), xxhash.xxh3_64_intdigest, 0
    while position + HEADER_BYTES <= len(piece):
        magic, size, index, kind, header_checksum, checksum = _HEADER.unpack_from(piece, position)
        stop = position + HEADER_BYTES + size
        if magic != MAGIC or stop > len(piece):
            break
        payload = view[position + HEADER_BYTES : stop]
        if header_checksum != digest(view[position : position + _START.size], key) or checksum != digest(payload, key):
            break
        if kind == _ERROR:
            errors.append(len(indices))
        indices.append(index)
        payloads.append(payload)
        position = stop
    return RecordRun(indices, payloads, errors, position)


def scan(file: BinaryIO, start: int, key: int) -> Iterator[Stretch]:
    """Everything from `start` to the end of the file, as records and damaged stretches without gaps between them."""
    size = os.fstat(file.fileno()).st_size
    position = start
    file.seek(position)
    while position < size:
        header = _decode_header(file.read(HEADER_BYTES), key)
        if header is None:
            stop = _find_header(file, position + 1, key)
            yield Stretch(position, stop, None)
        else:
            stop = min(position + HEADER_BYTES + header.payload_bytes, size)
            yield Stretch(position, stop, _verified(header, file.read(stop - position - HEADER_BYTES), key))
        position = stop
        if header is None:
            file.seek(position)


def _decode_header(raw: bytes, key: int) -> _Header | None:
    if len(raw) < HEADER_BYTES:
        return None
    magic, payload_bytes, index, kind, header_checksum, payload_checksum = _HEADER.unpack_from(raw)
    if magic != MAGIC or header_checksum != xxhash.xxh3_64_intdigest(raw[: _START.size], key):
        return None
    return _Header(payload_bytes, index, _KINDS[kind], payload_checksum)


def _verified(header: _Header, payload: bytes, key: int) -> Record | None:
    if len(payload) != header.payload_bytes or _checksum(payload, key) != header.payload_checksum:
        return None
    return Record(header.line_index, header.kind, payload)


def _find_header(file: BinaryIO, position: int, key: int) -> int:
    """Offset of the next whole header at or after `position`, or the size of the file."""
    while True:
        file.seek(position)
        chunk = file.read(_SEARCH_BYTES)
        found = chunk.find(MAGIC)
        while found >= 0:
            file.seek(position + found)
            if _decode_header(file.read(HEADER_BYTES), key) is not None:
                return position + found
            found = chunk.find(MAGIC, found + 1)
        if len(chunk) < _SEARCH_BYTES:
            return position + len(chunk)
        position += len(chunk) - len(MAGIC) + 1  # a magic number may lie across the edge


def _checksum(data: bytes, key: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seed=key)
