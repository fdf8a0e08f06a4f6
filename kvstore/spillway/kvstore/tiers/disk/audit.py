"""Reads a disk directory from outside any store: one that is idle, or beside the store that uses it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...buffers import PAGE_BYTES, ThreadBuffer, aligned
from ...errors import MountError, StillLivingError
from ...header import BlockHeader, checksum_of
from ...identity import BlockHash
from ...outcomes import MissReason
from .mount import claimed, look_at_shares
from .segment import DamagedHeaderError, Segment, read_geometry

_LOOKS = 3
_MOST_LOOKS = 20
_LOOK_AGAIN_S = 0.05
"""A slot that looks damaged may be just being written: it is called so once it has looked the same three times."""


@dataclass(frozen=True, slots=True)
class ShareView:
    """One share of a directory. ``holder``: the process whose store is open on it, empty if none is."""

    directory: Path
    path: Path
    holder: str
    generation: int
    identity: str
    weights: str
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class SlotView:
    """A slot with a block. ``fault``: why it cannot be served, None if it can, or if nobody looked.

    ``block`` is empty where the header is damaged or cannot be read.
    """

    segment: Path
    slot: int
    sequence: int
    block: BlockHash
    identity: bytes
    stored_bytes: int
    fault: MissReason | None = None


def shares_of(directory: Path) -> list[ShareView]:
    """All shares. Raises `MountError` if ``directory`` is no disk tier's or cannot be read."""
    if not (directory / "mount.json").exists():
        raise MountError(f"{directory} is no directory of a KV store: it has no mount.json")
    try:
        return [
            ShareView(
                directory=directory,
                path=path,
                holder=holder,
                generation=books.generation if books else 0,
                identity=books.identity_digest if books else "",
                weights=books.weights_digest if books else "",
                dtype=books.kv_dtype if books else "",
                bytes=sum(segment.stat().st_blocks * 512 for segment in path.glob("segment-*")),
            )
            for path, holder, books in look_at_shares(directory)
        ]
    except OSError as error:
        raise MountError(f"cannot look into {directory}: {error}") from error


def blocks_in(share: ShareView, *, verify: bool) -> Iterator[SlotView]:
    """Every block of a share, slot by slot, in one thread; with ``verify`` its bytes are read and checked.

    Checked is what the store checks before it decrypts: header, length, checksum. Raises `MountError` if a segment
    cannot be opened at all; a slot that cannot be read is a fault of its block, if its header was read.
    """
    for path in sorted(share.path.glob("segment-*.kv")):
        try:
            segment = _open(path)
        except OSError as error:
            raise MountError(f"cannot read {path}: {error}") from error
        if segment is None:
            continue
        reader = _Reader(segment, verify=verify)
        try:
            for slot in range(segment.geometry.slots):
                view = reader.look(slot)
                if view is not None:
                    yield view
        finally:
            segment.close(sync=False)


def withdraw(share: ShareView, slots: Iterable[SlotView]) -> int:
    """Make blocks of an idle share count no more; how many still stood there.

    Raises `StillLivingError` if a store uses the share, `MountError`.
    """
    by_segment: dict[Path, list[SlotView]] = {}
    for view in slots:
        by_segment.setdefault(view.segment, []).append(view)
    withdrawn = 0
    try:
        with claimed(share.directory, share.path) as free:
            if not free:
                raise StillLivingError(f"{share.path} is in use by {share.holder or 'a store'}")
            for path, views in by_segment.items():
                withdrawn += _retire(path, views)
    except OSError as error:
        raise MountError(f"cannot change {share.path}: {error}") from error
    return withdrawn


def empty(share: ShareView) -> int:
    """Delete all segments of an idle share; how many bytes they took. Raises `StillLivingError`, `MountError`."""
    freed = 0
    try:
        with claimed(share.directory, share.path) as free:
            if not free:
                raise StillLivingError(f"{share.path} is in use by {share.holder or 'a store'}")
            for path in sorted(share.path.glob("segment-*")):
                freed += path.stat().st_blocks * 512
                path.unlink()
    except OSError as error:
        raise MountError(f"cannot empty {share.path}: {error}") from error
    return freed


def _retire(path: Path, views: list[SlotView]) -> int:
    segment = _open(path, write=True)
    if segment is None:
        return 0
    try:
        still = [view for view in views if _sequence(segment, view.slot) == view.sequence]
        named = [view for view in still if view.block]
        if named:
            segment.retire([view.slot for view in named], max(view.sequence for view in named) + 1)
        nameless = [view for view in still if view.fault is MissReason.HEADER and not view.block]
        for view in nameless:
            segment.erase(view.slot)
    finally:
        segment.close(sync=True)
    return len(named) + len(nameless)


def _sequence(segment: Segment, slot: int) -> int | None:
    """Of the header in ``slot``; 0 for one that is damaged or cannot be read, None if there is none."""
    try:
        found = segment.read_header(slot)
    except OSError:
        return 0
    return found[1] if found is not None else None


def _open(path: Path, *, write: bool = False) -> Segment | None:
    """None for a file that is no segment, or not whole. Past the page cache, so that the device is what is read."""
    geometry = read_geometry(path)
    if geometry is None:
        return None
    scratch = ThreadBuffer(geometry.payload_bytes + PAGE_BYTES)
    try:
        return Segment(path, geometry, scratch, direct=True, write=write)
    except OSError:
        return Segment(path, geometry, scratch, direct=False, write=write)


class _Reader:
    """Looks at the slots of one segment, for one thread."""

    def __init__(self, segment: Segment, *, verify: bool) -> None:
        self._segment = segment
        self._verify = verify
        self._out = aligned(segment.geometry.payload_bytes)

    def look(self, slot: int) -> SlotView | None:
        """The block in a slot; None if there is none. One whose header cannot be read has no name."""
        seen: list[int] = []
        while len(seen) < _MOST_LOOKS:
            if seen:
                time.sleep(_LOOK_AGAIN_S)
            view = self._glance(slot, again=bool(seen))
            if view is None or view.fault is None:
                return view
            seen.append(view.sequence)
            if seen[-_LOOKS:] == [view.sequence] * _LOOKS:
                return view
        return None  # never the same block for long: it is in use

    def _glance(self, slot: int, *, again: bool) -> SlotView | None:
        try:
            if again:
                self._segment.reread_floors()
            found = self._segment.read_header(slot)
        except DamagedHeaderError:
            return SlotView(self._segment.path, slot, 0, BlockHash(b""), b"", 0, MissReason.HEADER)
        except OSError:
            return SlotView(self._segment.path, slot, 0, BlockHash(b""), b"", 0, MissReason.IO_ERROR)
        if found is None:
            return None
        header, sequence = found
        fault = self._fault(slot, header, sequence) if self._verify else None
        return SlotView(self._segment.path, slot, sequence, header.block, header.identity, header.stored_bytes, fault)

    def _fault(self, slot: int, header: BlockHeader, sequence: int) -> MissReason | None:
        try:
            again = self._segment.read(slot, self._out)
        except OSError:
            return MissReason.IO_ERROR
        if again != (header, sequence):
            return MissReason.HEADER
        return None if checksum_of(self._out[: header.stored_bytes]) == header.checksum else MissReason.CHECKSUM
