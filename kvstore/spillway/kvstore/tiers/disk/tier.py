"""Blocks in segment files of one share of a disk directory."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from ...buffers import PAGE_BYTES, Bytes, ThreadBuffer, round_up
from ...errors import ConfigError, ConservationError, MountError
from ...eviction.base import EvictionPolicy
from ...header import BlockHeader
from ...identity import BlockHash, KVIdentity
from ...outcomes import MissReason, StoreOutcome
from ..base import Tier, TierIndex, TierUsage
from .files import ShortTransferError, supports_direct_io
from .mount import open_share
from .scan import Place, scan_share
from .segment import Geometry, Segment, create_segment, slots_within

_log = logging.getLogger(__name__)

_SEGMENT_BYTES = 256 << 20
_MOST_SEGMENTS = 64
_RETIRE_BATCH = 64
"""Slots emptied at once: their headers are retired by one write per floor page they touch."""
_GENERATION_SHIFT = 40
_GROWTH_PAUSE_S = 5.0
"""After a file could not be added, how long until it is tried again."""


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """``budget_bytes`` is for the whole ``directory``, shared equally by ``sharers`` stores; see `mount`.

    ``stored_bytes``: the most bytes one block takes here. ``free_floor_bytes``: the file system's free space that the
    tier never grows into.
    """

    directory: Path
    budget_bytes: int
    stored_bytes: int
    identity: KVIdentity
    sharers: int = 1
    free_floor_bytes: int = 0


@dataclass(slots=True)
class _Entry:
    place: Place
    readers: int = 0
    failed: bool = False


class DiskTier(Tier):
    """Preallocated slots, direct I/O where the file system has it, warm after a restart.

    A slot is *clean* (no header in it counts: may be written), *stale* (its block has left, its header must be retired
    first), *used*, *foreign* (holds a block of another identity), *busy* (being written or, after eviction, still read)
    or *lost* (an I/O error struck it). ``_books`` guards all of that; ``_allocation`` is held while slots are retired
    or files grown, so that loads never wait for that. Order: ``_allocation``, then ``_books``.
    """

    def __init__(self, name: str, config: DiskConfig, policy: EvictionPolicy, door: TierIndex) -> None:
        """Take a share and read its headers. Raises `MountError` and its children, `ConfigError`."""
        self.name = name
        self._config = config
        self._policy = policy
        self._door = door
        self._books = threading.Lock()
        self._allocation = threading.Lock()
        self._payload_bytes = round_up(config.stored_bytes)
        self._share = open_share(config.directory, config.budget_bytes, config.sharers, config.identity)
        try:
            self._open_segments()
        except BaseException:
            self._share.release()
            raise

    def _open_segments(self) -> None:
        if not slots_within(self._payload_bytes, self._share.budget_bytes):
            need = Geometry(self._payload_bytes, 1).reserved_bytes
            raise ConfigError(
                f"a share of {self._share.budget_bytes} bytes of the disk budget holds no block: one takes {need}"
            )
        scratch = ThreadBuffer(self._payload_bytes + PAGE_BYTES)
        self.direct = supports_direct_io(self._share.directory)
        identity = self._config.identity.digest()
        try:
            scan = scan_share(self._share, scratch, self._payload_bytes, identity, direct=self.direct)
        except OSError as error:
            raise MountError(f"cannot read {self._share.directory}: {error}") from error
        self._scratch = scratch
        self._segments = scan.segments
        self._unusable = deque(scan.unusable)
        self._entries = {block: _Entry(place) for block, place in scan.own.items()}
        self._foreign = deque(scan.foreign)
        self._clean = scan.clean
        self._stale = deque(scan.stale)
        self._lost = len(scan.lost)
        self._damaged = scan.damaged
        if scan.damaged:
            _log.warning("%s: %d headers or files were found damaged", self._share.directory, scan.damaged)
        self._busy = 0
        self._writing: set[BlockHash] = set()
        generation = max(self._share.generation, (scan.highest_sequence >> _GENERATION_SHIFT) + 1)
        self._sequence = generation << _GENERATION_SHIFT
        self._evictions = self._foreign_evictions = 0
        self._no_growth_until = 0.0
        for block in self._entries:
            self._policy.insert(block)
            self._door.publish(block)

    def store(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:
        """See `Tier.store`. No extra copy if ``stored`` is aligned and padded to whole pages."""
        block = header.block
        with self._books:
            if block in self._entries or block in self._writing:
                self._policy.touch(block)
                return StoreOutcome.PRESENT
            self._writing.add(block)
        place: Place | None = None
        outcome = StoreOutcome.FULL
        try:
            place = self._take()
            if place is not None:
                place.segment.write(place.slot, header, place.sequence, stored)
                outcome = StoreOutcome.STORED
        except OSError as error:
            outcome = _outcome_of(error)
        with self._books:
            self._writing.discard(block)
            if place is not None:
                self._busy -= 1
                if outcome is StoreOutcome.STORED:
                    self._entries[block] = _Entry(place)
                    self._policy.insert(block)
                    self._door.publish(block)
                elif outcome is StoreOutcome.IO_ERROR:
                    self._lost += 1
                else:
                    self._stale.append(place)
        return outcome

    def load(self, block: BlockHash, out: Bytes) -> BlockHeader | MissReason:
        """See `Tier.load`. No extra copy if ``out`` is aligned and holds the block's padded bytes."""
        with self._books:
            entry = self._entries.get(block)
            if entry is None:
                return MissReason.ABSENT
            entry.readers += 1
            self._policy.touch(block)
        failed = False
        try:
            found = entry.place.segment.read(entry.place.slot, out)
        except ShortTransferError:
            return MissReason.SHORT_READ
        except OSError:
            failed = True
            return MissReason.IO_ERROR
        finally:
            with self._books:
                self._release(block, entry, failed=failed)
        if found is None or found[1] != entry.place.sequence:
            return MissReason.HEADER
        return found[0]

    def contains(self, block: BlockHash) -> bool:
        """See `Tier.contains`."""
        return block in self._entries

    def drop(self, block: BlockHash) -> bool:
        """See `Tier.drop`."""
        with self._books:
            return self._remove(block, evicted=False)

    def usage(self) -> TierUsage:
        """See `Tier.usage`. ``total`` counts the slots of files that exist; the tier grows up to its budget."""
        allocated_bytes = self._share.allocated_bytes()
        with self._books:
            return TierUsage(
                total=sum(segment.geometry.slots for segment in self._segments),
                free=len(self._clean) + len(self._stale),
                used=len(self._entries),
                pinned=self._busy,
                foreign=len(self._foreign),
                lost=self._lost,
                damaged=self._damaged,
                allocated_bytes=allocated_bytes,
                budget_bytes=self._share.budget_bytes,
                evictions=self._evictions,
                foreign_evictions=self._foreign_evictions,
            )

    def check(self) -> None:
        """See `Tier.check`."""
        usage = self.usage()
        with self._books:
            accounted = usage.free + usage.used + usage.pinned + usage.foreign + usage.lost
            if accounted != usage.total:
                raise ConservationError(f"{self.name}: {accounted} of {usage.total} slots are accounted for")
            places = [(id(entry.place.segment), entry.place.slot) for entry in self._entries.values()]
            places += [(id(place.segment), place.slot) for place in (*self._clean, *self._stale, *self._foreign)]
            if len(set(places)) != len(places):
                raise ConservationError(f"{self.name}: a slot stands in the books twice")
            if usage.allocated_bytes > usage.budget_bytes:
                raise ConservationError(f"{self.name}: {usage.allocated_bytes} bytes exceed {usage.budget_bytes}")
            if self._door.index.snapshot(self.name) != self._entries.keys():
                raise ConservationError(f"{self.name}: the index disagrees about which blocks are held")
            if sorted(self._policy.coldest(len(self._entries) + 1)) != sorted(self._entries):
                raise ConservationError(f"{self.name}: the eviction policy orders other blocks than are held")

    def close(self) -> None:
        """See `Tier.close`. Syncs the files; a refusal is logged, and its damage found by the checksums later."""
        for segment in self._segments:
            try:
                segment.close(sync=True)
            except OSError as error:
                _log.warning("%s was not synced: %s", segment.path, error)
        self._segments.clear()
        self._share.release()

    def _take(self) -> Place | None:
        """A clean slot with the sequence number for its next header; counted as busy. Raises OSError."""
        with self._allocation:
            if not self._clean and not self._stale and not self._grow():
                self._empty_slots()
            if not self._clean:
                self._retire_stale()
            with self._books:
                if not self._clean:
                    return None
                self._busy += 1
                self._sequence += 1
                place = self._clean.pop()
                return Place(place.segment, place.slot, self._sequence)

    def _retire_stale(self) -> None:
        """Make up to a batch of stale slots clean. The allocation lock is held. Raises OSError."""
        with self._books:
            batch = [self._stale.popleft() for _ in range(min(_RETIRE_BATCH, len(self._stale)))]
            self._busy += len(batch)
            floor = self._sequence + 1
        by_segment: dict[int, list[Place]] = {}
        for place in batch:
            by_segment.setdefault(id(place.segment), []).append(place)
        clean: list[Place] = []
        try:
            for places in by_segment.values():
                places[0].segment.retire([place.slot for place in places], floor)
                clean += places
        finally:
            with self._books:
                self._busy -= len(batch)
                self._clean += clean
                if len(clean) < len(batch):
                    done = {id(place) for place in clean}
                    self._stale.extend(place for place in batch if id(place) not in done)

    def _empty_slots(self) -> None:
        """Make slots stale: foreign blocks leave first, then the coldest own ones."""
        with self._books:
            total = len(self._entries) + len(self._foreign)
            batch = max(1, min(_RETIRE_BATCH, total // 32))
            while self._foreign and batch:
                self._stale.append(self._foreign.popleft())
                self._foreign_evictions += 1
                batch -= 1
            for block in self._policy.coldest(batch):
                self._remove(block, evicted=True)
                self._evictions += 1

    def _remove(self, block: BlockHash, *, evicted: bool) -> bool:
        entry = self._entries.pop(block, None)
        if entry is None:
            return False
        self._door.withdraw(block)
        self._policy.remove(block, evicted=evicted)
        if entry.readers:
            self._busy += 1
        else:
            self._stale.append(entry.place)
        return True

    def _release(self, block: BlockHash, entry: _Entry, *, failed: bool) -> None:
        """One reader of ``entry`` is done. A slot that failed to be read is not used again."""
        entry.failed = entry.failed or failed
        if entry.failed and self._entries.get(block) is entry:
            self._remove(block, evicted=False)
        entry.readers -= 1
        if entry.readers == 0 and self._entries.get(block) is not entry:
            self._busy -= 1
            if entry.failed:
                self._lost += 1
            else:
                self._stale.append(entry.place)

    def _grow(self) -> bool:
        """Add a segment if budget, free-space floor and file system allow. The allocation lock is held."""
        if time.monotonic() < self._no_growth_until:
            return False
        wanted = min(self._share.budget_bytes, max(_SEGMENT_BYTES, self._share.budget_bytes // _MOST_SEGMENTS))
        smallest = Geometry(self._payload_bytes, 1).reserved_bytes
        try:
            while (room := self._room()) < smallest and self._unusable:
                self._unusable.popleft().unlink(missing_ok=True)
            slots = slots_within(self._payload_bytes, min(wanted, room, self._space_above_floor()))
            if slots == 0:
                self._no_growth_until = time.monotonic() + _GROWTH_PAUSE_S
                return False
            path = self._share.next_segment_path()
            geometry = Geometry(self._payload_bytes, slots)
            create_segment(path, geometry, direct=self.direct)
            segment = Segment(path, geometry, self._scratch, direct=self.direct)
        except OSError as error:
            _log.warning("%s does not grow for now: %s", self._share.directory, error)
            self._no_growth_until = time.monotonic() + _GROWTH_PAUSE_S
            return False
        with self._books:
            self._segments.append(segment)
            self._clean.extend(Place(segment, slot) for slot in range(slots - 1, -1, -1))
        return True

    def _room(self) -> int:
        """Bytes of the share that no segment takes or can come to take, though someone cut or removed its file."""
        taken = self._share.file_bytes()
        for segment in self._segments:
            taken[segment.path] = max(taken.get(segment.path, 0), segment.geometry.reserved_bytes)
        return self._share.budget_bytes - sum(taken.values())

    def _space_above_floor(self) -> int:
        status = os.statvfs(self._share.directory)
        return max(0, status.f_bavail * status.f_frsize - self._config.free_floor_bytes)


def _outcome_of(error: OSError) -> StoreOutcome:
    if isinstance(error, ShortTransferError):
        return StoreOutcome.SHORT_WRITE
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreOutcome.NO_SPACE
    return StoreOutcome.IO_ERROR
