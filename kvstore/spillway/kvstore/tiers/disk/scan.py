"""What a share's segment files hold, read from their headers when it is opened."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ...buffers import ThreadBuffer
from ...header import BlockHeader
from ...identity import BlockHash
from .mount import Share
from .segment import DamagedHeaderError, Segment, read_geometry

_SCAN_THREADS = 8
_SCAN_SLOTS = 256


@dataclass(slots=True)
class Place:
    """One slot of one segment, and the sequence number of the header that counts in it."""

    segment: Segment
    slot: int
    sequence: int = 0


@dataclass(slots=True)
class Scan:
    """``own``: blocks of this identity, oldest write first. ``foreign``: slots with blocks of another identity.

    ``clean``: slots with no header that counts. ``stale``: slots whose block stands elsewhere with a later number.
    ``lost``: slots whose header cannot be read. ``unusable``: files with slots of another size, or no segments at all.
    ``damaged``: headers and files that are not what was once written there; such slots are clean, such files unusable.
    """

    segments: list[Segment] = field(default_factory=list)
    own: dict[BlockHash, Place] = field(default_factory=dict)
    foreign: list[Place] = field(default_factory=list)
    clean: list[Place] = field(default_factory=list)
    stale: list[Place] = field(default_factory=list)
    lost: list[Place] = field(default_factory=list)
    unusable: list[Path] = field(default_factory=list)
    highest_sequence: int = 0
    damaged: int = 0


def scan_share(share: Share, scratch: ThreadBuffer, payload_bytes: int, identity: bytes, *, direct: bool) -> Scan:
    """Open the share's segments and read every header. A file or page that cannot be read is put aside, not raised."""
    scan = Scan()
    for path in share.segment_paths():
        try:
            geometry = read_geometry(path)
            if geometry is None:
                scan.damaged += 1
            elif geometry.payload_bytes == payload_bytes:
                scan.segments.append(Segment(path, geometry, scratch, direct=direct))
                continue
        except OSError:
            pass  # told apart from a readable file by where it ends up, and counted there
        scan.unusable.append(path)
    ranges = [
        (segment, range(start, min(start + _SCAN_SLOTS, segment.geometry.slots)))
        for segment in scan.segments
        for start in range(0, segment.geometry.slots, _SCAN_SLOTS)
    ]
    with ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="kv-scan") as pool:
        for part in pool.map(lambda task: _read_headers(*task), ranges):
            for place, header in part:
                _enter(scan, place, header, identity)
    scan.own = dict(sorted(scan.own.items(), key=lambda item: item[1].sequence))
    floors = (segment.highest_floor for segment in scan.segments)
    scan.highest_sequence = max(scan.highest_sequence, *floors, 0)
    return scan


def _read_headers(segment: Segment, slots: range) -> list[tuple[Place, BlockHeader | OSError | None]]:
    answers: list[tuple[Place, BlockHeader | OSError | None]] = []
    for slot in slots:
        try:
            found = segment.read_header(slot)
        except OSError as error:
            answers.append((Place(segment, slot), error))
        else:
            answers.append((Place(segment, slot, found[1]), found[0]) if found else (Place(segment, slot), None))
    return answers


def _enter(scan: Scan, place: Place, header: BlockHeader | OSError | None, identity: bytes) -> None:
    scan.highest_sequence = max(scan.highest_sequence, place.sequence)
    if isinstance(header, DamagedHeaderError):
        scan.damaged += 1
        scan.clean.append(place)
    elif isinstance(header, OSError):
        scan.lost.append(place)
    elif header is None:
        scan.clean.append(place)
    elif header.identity != identity:
        scan.foreign.append(place)
    else:
        other = scan.own.get(header.block)
        if other is not None and other.sequence > place.sequence:
            scan.stale.append(place)
            return
        if other is not None:
            scan.stale.append(other)
        scan.own[header.block] = place
