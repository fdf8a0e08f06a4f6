"""One segment file: a page that describes it, a table of floors, then slots.

    page 0   | floors: one uint64 per slot, padded to whole pages | slot 0 | slot 1 | …
    slot     = payload, padded to whole pages | header page

A slot's header lies *behind* its payload and both go out in one write, so a write that stops early leaves no new
header. The old header stops counting before the write starts: a header counts only if its sequence number reaches the
slot's **floor**, and one write of a floor page retires the old headers of many slots at once. So at no instant does a
header name another block's bytes; what a power cut reorders, the checksum finds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from ...buffers import PAGE_BYTES, Bytes, ThreadBuffer, aligned, is_aligned, round_up
from ...header import HEADER_BYTES, BlockHeader, unpack
from .files import open_file, read_all, write_all

_MAGIC = b"SPWKVSEG"
_VERSION = 1
_PAGE = struct.Struct("<8sIQQ")
"""magic, version, payload bytes per slot, slots; followed by the xxh3-64 of these."""
_FLOOR_BYTES = 8
_HIGHEST_FLOOR = 1 << 62
"""No sequence number comes near it: a higher floor is damage, and must not drive the numbers over their end."""


class DamagedHeaderError(OSError):
    """Where a slot's header should be there is neither a header nor nothing."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a segment. ``payload_bytes`` is a multiple of the page size."""

    payload_bytes: int
    slots: int

    @property
    def stride(self) -> int:
        """Bytes per slot, its header page included."""
        return self.payload_bytes + PAGE_BYTES

    @property
    def slots_offset(self) -> int:
        """Where slot 0 begins."""
        return PAGE_BYTES + round_up(self.slots * _FLOOR_BYTES)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.slots_offset + self.slots * self.stride

    @property
    def reserved_bytes(self) -> int:
        """What the file can come to take of the disk: its extents take more as it is written.

        A slot written into preallocated space splits an extent in two; ext4 keeps 340 to a block, half-full at worst.
        """
        return self.file_bytes + 2 * PAGE_BYTES + 64 * self.slots

    def offset(self, slot: int) -> int:
        """Where ``slot`` begins."""
        return self.slots_offset + slot * self.stride


def slots_within(payload_bytes: int, budget_bytes: int) -> int:
    """The most slots a segment that takes at most ``budget_bytes`` can have."""
    slots = max(0, (budget_bytes - 4 * PAGE_BYTES) // (payload_bytes + PAGE_BYTES))
    while slots and Geometry(payload_bytes, slots).reserved_bytes > budget_bytes:
        slots -= 1
    return slots


def read_geometry(path: Path) -> Geometry | None:
    """What the file says about itself; None if it is no whole segment of this version. Raises OSError."""
    with path.open("rb") as file:
        page = file.read(PAGE_BYTES)
    if len(page) < PAGE_BYTES:
        return None
    magic, version, payload_bytes, slots = _PAGE.unpack_from(page)
    (check,) = struct.unpack_from("<Q", page, _PAGE.size)
    if magic != _MAGIC or version != _VERSION or check != xxhash.xxh3_64_intdigest(page[: _PAGE.size]):
        return None
    geometry = Geometry(payload_bytes, slots)
    return geometry if path.stat().st_size == geometry.file_bytes else None


def create_segment(path: Path, geometry: Geometry, *, direct: bool) -> None:
    """Allocate the file's blocks and describe it, under a temporary name until it is whole. Raises OSError."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    page = aligned(PAGE_BYTES)
    head = _PAGE.pack(_MAGIC, _VERSION, geometry.payload_bytes, geometry.slots)
    page[: len(head) + 8] = np.frombuffer(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)), dtype=np.uint8)
    descriptor = open_file(temporary, direct=direct, create=True)
    try:
        os.posix_fallocate(descriptor, 0, geometry.file_bytes)
        write_all(descriptor, [page], 0)
        os.fdatasync(descriptor)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    temporary.rename(path)


class Segment:
    """An open segment. Slots may be read and written from many threads at once; whose slot it is, the tier knows."""

    def __init__(
        self, path: Path, geometry: Geometry, scratch: ThreadBuffer, *, direct: bool, write: bool = True
    ) -> None:
        """``scratch`` has the length of a slot. Raises OSError."""
        self.path = path
        self.geometry = geometry
        self._descriptor = open_file(path, direct=direct, write=write)
        table_bytes = round_up(geometry.slots * _FLOOR_BYTES)
        self._table = aligned(table_bytes)
        self._floors = self._table.view("<u8")
        self._scratch = scratch
        try:
            self.reread_floors()
        except OSError:
            os.close(self._descriptor)
            raise

    def write(self, slot: int, header: BlockHeader, sequence: int, stored: Bytes) -> None:
        """Write payload and header in one call, without a copy if ``stored`` is aligned and padded. Raises OSError."""
        scratch = self._scratch.bytes
        size = self.geometry.payload_bytes
        scratch[size : size + HEADER_BYTES] = np.frombuffer(header.pack(sequence), dtype=np.uint8)
        if stored.nbytes == size and is_aligned(stored):
            parts = [stored, scratch[size:]]
        else:
            np.copyto(scratch[: header.stored_bytes], stored[: header.stored_bytes])
            parts = [scratch]
        write_all(self._descriptor, parts, self.geometry.offset(slot))

    def read(self, slot: int, out: Bytes) -> tuple[BlockHeader, int] | None:
        """Read a slot into the start of ``out``; its header and sequence; None if it has none or ``out`` is short.

        No extra copy if ``out`` is aligned and holds the whole padded payload. Raises OSError.
        """
        scratch = self._scratch.bytes
        size = self.geometry.payload_bytes
        direct = out.nbytes >= size and is_aligned(out[:size])
        read_all(self._descriptor, [out[:size], scratch[size:]] if direct else [scratch], self.geometry.offset(slot))
        found = unpack(scratch[size : size + HEADER_BYTES].tobytes())
        if found is None or found[0].stored_bytes > min(out.nbytes, size):
            return None
        if not direct:
            np.copyto(out[: found[0].stored_bytes], scratch[: found[0].stored_bytes])
        return found

    def read_header(self, slot: int) -> tuple[BlockHeader, int] | None:
        """The header of a slot and its sequence if it counts, else None. Raises OSError, `DamagedHeaderError` too."""
        page = self._scratch.bytes[self.geometry.payload_bytes :]
        read_all(self._descriptor, [page], self.geometry.offset(slot) + self.geometry.payload_bytes)
        found = unpack(page[:HEADER_BYTES].tobytes())
        if found is None and page[:HEADER_BYTES].any():
            raise DamagedHeaderError(f"{self.path} has a damaged header in slot {slot}")
        return found if found is not None and found[1] >= self.floor(slot) else None

    def reread_floors(self) -> None:
        """Take the floors from the file, where another process may have written them. Raises OSError."""
        read_all(self._descriptor, [self._table], PAGE_BYTES)
        # Without a floor old headers count again; the checksum tells if their bytes have been overwritten since.
        self._floors[self._floors > _HIGHEST_FLOOR] = 0

    def floor(self, slot: int) -> int:
        """The lowest sequence number that counts in ``slot``."""
        return int(self._floors[slot])

    @property
    def highest_floor(self) -> int:
        """The highest floor of all slots."""
        return int(self._floors.max())

    def retire(self, slots: Iterable[int], floor: int) -> None:
        """Make the headers now in ``slots`` count no more. Raises OSError; then nothing can be said about them."""
        pages = set()
        for slot in slots:
            self._floors[slot] = floor
            pages.add(slot * _FLOOR_BYTES // PAGE_BYTES)
        for page in sorted(pages):
            start = page * PAGE_BYTES
            write_all(self._descriptor, [self._table[start : start + PAGE_BYTES]], PAGE_BYTES + start)

    def erase(self, slot: int) -> None:
        """Leave no header in ``slot``, not even a damaged one. Raises OSError."""
        at = self.geometry.offset(slot) + self.geometry.payload_bytes
        write_all(self._descriptor, [aligned(PAGE_BYTES)], at)

    def close(self, *, sync: bool) -> None:
        """Close the file, after what was written is on the device if ``sync``. Raises OSError."""
        try:
            if sync:
                os.fdatasync(self._descriptor)
        finally:
            os.close(self._descriptor)
