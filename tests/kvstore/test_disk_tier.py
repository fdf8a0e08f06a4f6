"""Segment files across restarts and damage: warm, or a miss; never another block's bytes."""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kv_factories import BLOCK_BYTES, IDENTITY, OTHER_IDENTITY, TierBench, blank, content, disk_bytes, disk_tier, name

from spillway.kvstore.buffers import Bytes
from spillway.kvstore.eviction.lru import LRU
from spillway.kvstore.header import HEADER_BYTES, BlockHeader, unpack
from spillway.kvstore.identity import KVIdentity
from spillway.kvstore.index.memory import MemoryIndex
from spillway.kvstore.outcomes import MissReason, StoreOutcome
from spillway.kvstore.sealing import Sealer
from spillway.kvstore.tiers.base import TierIndex
from spillway.kvstore.tiers.disk import files, segment
from spillway.kvstore.tiers.disk import tier as disk_module
from spillway.kvstore.tiers.disk.segment import Geometry, read_geometry
from spillway.kvstore.tiers.disk.tier import DiskConfig, DiskTier


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[TierBench]:
    made = TierBench(disk_tier(tmp_path, 12))
    yield made
    made.tier.check()
    made.tier.close()


def reopened(bench: TierBench, directory: Path, blocks: int = 12, identity: KVIdentity = IDENTITY) -> TierBench:
    bench.tier.close()
    bench.tier = disk_tier(directory, blocks, identity)
    bench.tier.check()
    return bench


def segment_file(directory: Path) -> Path:
    (path,) = directory.rglob("segment-*.kv")
    return path


def slot_of(path: Path, number: int) -> int:
    """Where the block's slot begins in the file."""
    geometry = read_geometry(path)
    data = path.read_bytes()
    for slot in range(geometry.slots):
        start = geometry.offset(slot)
        found = unpack(data[start + geometry.payload_bytes :][:HEADER_BYTES])
        if found is not None and found[0].block == name(number):
            return start
    raise AssertionError(f"block {number} has no header in {path}")


def verified(bench: TierBench, number: int) -> Bytes | str:
    """Load and verify, as the store does above a tier."""
    out = blank()
    answer = bench.tier.load(name(number), out)
    if isinstance(answer, BlockHeader):
        return Sealer(IDENTITY.digest(), BLOCK_BYTES).verify(name(number), answer, out) or out
    return answer


class TestRestart:
    def test_a_new_generation_takes_over_what_the_last_one_wrote(self, bench: TierBench, tmp_path: Path) -> None:
        for number in range(8):
            bench.store(number)
        reopened(bench, tmp_path)
        assert bench.tier.usage().used == 8
        for number in range(8):
            assert np.array_equal(bench.load(number), content(number))

    def test_what_was_evicted_or_dropped_and_overwritten_stays_gone(self, bench: TierBench, tmp_path: Path) -> None:
        for number in range(40):
            bench.store(number)
        held = {number for number in range(40) if bench.tier.contains(name(number))}
        reopened(bench, tmp_path)
        still = {number for number in range(40) if bench.tier.contains(name(number))}
        assert held <= still, "a block was lost over a clean restart"
        for number in still:
            assert np.array_equal(bench.load(number), content(number))

    def test_the_oldest_write_is_the_coldest_after_a_restart(self, bench: TierBench, tmp_path: Path) -> None:
        for number in (3, 1, 2):
            bench.store(number)
        reopened(bench, tmp_path)
        assert bench.tier._policy.coldest(3) == [name(3), name(1), name(2)]

    def test_sequence_numbers_rise_over_every_restart(self, bench: TierBench, tmp_path: Path) -> None:
        seen = []
        for number in range(4):
            bench.store(number)
            seen.append(bench.tier._entries[name(number)].place.sequence)
            reopened(bench, tmp_path)
        assert seen == sorted(set(seen))

    def test_sequence_numbers_rise_even_if_the_books_are_lost(self, bench: TierBench, tmp_path: Path) -> None:
        for _ in range(3):
            reopened(bench, tmp_path)
        bench.store(1)
        before = bench.tier._entries[name(1)].place.sequence
        (tmp_path / "share-00" / "share.json").write_bytes(b"{torn")
        reopened(bench, tmp_path)
        bench.store(2)
        assert bench.tier._entries[name(2)].place.sequence > before
        assert np.array_equal(bench.load(1), content(1))

    def test_a_smaller_budget_shrinks_the_files(self, bench: TierBench, tmp_path: Path) -> None:
        for number in range(12):
            bench.store(number)
        reopened(bench, tmp_path, blocks=4)
        for number in range(100, 120):
            bench.store(number)
        usage = bench.tier.usage()
        assert usage.allocated_bytes <= usage.budget_bytes <= disk_bytes(4)
        assert usage.used <= 4

    def test_a_larger_budget_grows_beside_the_old_files(self, bench: TierBench, tmp_path: Path) -> None:
        for number in range(12):
            bench.store(number)
        reopened(bench, tmp_path, blocks=24)
        for number in range(12, 20):
            assert bench.store(number) is StoreOutcome.STORED
        assert bench.tier.usage().evictions == 0
        assert all(np.array_equal(bench.load(number), content(number)) for number in range(20))

    def test_files_with_slots_of_another_size_make_room_when_it_is_needed(
        self, bench: TierBench, tmp_path: Path
    ) -> None:
        for number in range(12):
            bench.store(number)
        bench.tier.close()
        config = DiskConfig(tmp_path, disk_bytes(12), 2 * BLOCK_BYTES, OTHER_IDENTITY)
        bench.tier = DiskTier("disk", config, LRU(), TierIndex(MemoryIndex(), "disk"))
        assert bench.tier.usage().used == 0
        big = content(1, 2 * BLOCK_BYTES)
        header = Sealer(OTHER_IDENTITY.digest(), big.nbytes).seal_plain(name(1, OTHER_IDENTITY), big)
        assert bench.tier.store(header, big) is StoreOutcome.STORED
        usage = bench.tier.usage()
        assert usage.allocated_bytes <= usage.budget_bytes

    def test_an_unfinished_segment_is_removed(self, bench: TierBench, tmp_path: Path) -> None:
        (tmp_path / "share-00" / "segment-000007.new").write_bytes(bytes(100))
        reopened(bench, tmp_path)
        assert not list(tmp_path.rglob("*.new"))

    def test_twenty_thousand_headers_are_read_back(self, tmp_path: Path) -> None:
        """Small slots, so that the scan is the work."""
        identity = replace(IDENTITY, block_tokens=1)
        budget = 20_000 * 8192 + (1 << 20)
        config = DiskConfig(tmp_path, budget, 64, identity)
        tier = DiskTier("disk", config, LRU(), TierIndex(MemoryIndex(), "disk"))
        data = content(1, 64)
        for number in range(100):
            tier.store(Sealer(identity.digest(), 64).seal_plain(name(number), data), data)
        assert tier.usage().total > 19_000
        tier.close()
        tier = DiskTier("disk", config, LRU(), TierIndex(MemoryIndex(), "disk"))
        assert tier.usage().used == 100
        tier.check()
        tier.close()


class TestDamage:
    def overwrite(self, directory: Path, offset: int, data: bytes) -> None:
        with segment_file(directory).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def test_a_torn_payload_is_found_by_its_checksum(self, bench: TierBench, tmp_path: Path) -> None:
        bench.store(1)
        bench.store(2)
        bench.tier.close()
        self.overwrite(tmp_path, slot_of(segment_file(tmp_path), 1) + 4096, bytes(4096))
        bench.tier = disk_tier(tmp_path, 12)
        assert verified(bench, 1) is MissReason.CHECKSUM
        assert np.array_equal(verified(bench, 2), content(2))

    def test_a_torn_header_is_dropped_when_headers_are_read(self, bench: TierBench, tmp_path: Path) -> None:
        bench.store(1)
        bench.store(2)
        bench.tier.close()
        self.overwrite(tmp_path, slot_of(segment_file(tmp_path), 1) + BLOCK_BYTES + 20, b"\xff" * 8)
        bench.tier = disk_tier(tmp_path, 12)
        assert not bench.tier.contains(name(1))
        assert bench.tier.contains(name(2))

    def test_slots_that_change_places_are_told_apart(self, bench: TierBench, tmp_path: Path) -> None:
        """Payloads swapped under their headers, while the store is open."""
        bench.store(1)
        bench.store(2)
        one, two = (slot_of(segment_file(tmp_path), number) for number in (1, 2))
        self.overwrite(tmp_path, one, content(2).tobytes())
        self.overwrite(tmp_path, two, content(1).tobytes())
        os.sync()
        assert verified(bench, 1) is MissReason.CHECKSUM
        assert verified(bench, 2) is MissReason.CHECKSUM

    def test_whole_slots_that_change_places_are_told_apart(self, bench: TierBench, tmp_path: Path) -> None:
        bench.store(1)
        bench.store(2)
        path = segment_file(tmp_path)
        one, two = slot_of(path, 1), slot_of(path, 2)
        data = path.read_bytes()
        stride = read_geometry(path).stride
        self.overwrite(tmp_path, one, data[two : two + stride])
        self.overwrite(tmp_path, two, data[one : one + stride])
        assert verified(bench, 1) is MissReason.HEADER
        assert verified(bench, 2) is MissReason.HEADER

    def test_a_copied_header_of_an_old_block_does_not_bring_it_back(self, bench: TierBench, tmp_path: Path) -> None:
        """The state a crash between retiring a slot and overwriting it leaves: the old header is there, and void."""
        bench.store(1)
        bench.tier.drop(name(1))
        for number in range(10, 22):
            bench.store(number)
        assert bench.tier.usage().evictions == 0
        bench.tier.close()
        path = segment_file(tmp_path)
        geometry = read_geometry(path)
        floors = np.frombuffer(path.read_bytes()[4096 : 4096 + 8 * geometry.slots], dtype="<u8")
        assert np.count_nonzero(floors) == 1, "one slot was reused, so one floor rose"
        bench.tier = disk_tier(tmp_path, 12)
        assert not bench.tier.contains(name(1))

    @pytest.mark.parametrize("length", [0, 100, 4096, 9000, 60_000])
    def test_a_truncated_file_is_put_aside(self, bench: TierBench, tmp_path: Path, length: int) -> None:
        for number in range(6):
            bench.store(number)
        bench.tier.close()
        os.truncate(segment_file(tmp_path), length)
        bench.tier = disk_tier(tmp_path, 12)
        assert bench.tier.usage().used == 0
        assert bench.store(1) is StoreOutcome.STORED
        assert np.array_equal(bench.load(1), content(1))

    def test_files_swapped_between_models_are_not_served(self, bench: TierBench, tmp_path: Path) -> None:
        bench.store(1)
        bench.tier.close()
        other = tmp_path / "other"
        theirs = TierBench(disk_tier(other, 12, OTHER_IDENTITY))
        data = content(77)
        theirs.tier.store(Sealer(OTHER_IDENTITY.digest(), BLOCK_BYTES).seal_plain(name(1, OTHER_IDENTITY), data), data)
        theirs.tier.close()
        (path,) = (tmp_path / "share-00").glob("segment-*.kv")
        (their_path,) = other.rglob("segment-*.kv")
        their_path.replace(path)
        bench.tier = disk_tier(tmp_path, 12)
        usage = bench.tier.usage()
        assert (usage.used, usage.foreign) == (0, 1)


class TestTrouble:
    """I/O errors, short transfers and full disks are outcomes, not exceptions."""

    def fail(self, monkeypatch: pytest.MonkeyPatch, function: str, error: OSError) -> None:
        def broken(descriptor: int, parts: Sequence[Bytes], offset: int) -> None:
            raise error

        monkeypatch.setattr(segment, function, broken)

    @pytest.mark.parametrize(
        ("error", "outcome"),
        [
            (OSError(errno.ENOSPC, "full"), StoreOutcome.NO_SPACE),
            (OSError(errno.EDQUOT, "quota"), StoreOutcome.NO_SPACE),
            (OSError(errno.EIO, "broken"), StoreOutcome.IO_ERROR),
            (files.ShortTransferError("short"), StoreOutcome.SHORT_WRITE),
        ],
    )
    def test_a_failed_write_is_not_findable(
        self, bench: TierBench, tmp_path: Path, error: OSError, outcome: StoreOutcome
    ) -> None:
        bench.store(1)
        with pytest.MonkeyPatch.context() as patch:
            self.fail(patch, "write_all", error)
            assert bench.store(2) is outcome
        bench.tier.check()
        assert bench.load(2) is MissReason.ABSENT
        assert bench.tier.usage().lost == (outcome is StoreOutcome.IO_ERROR)
        reopened(bench, tmp_path)
        assert not bench.tier.contains(name(2))
        assert np.array_equal(bench.load(1), content(1))

    def test_a_slot_that_cannot_be_read_is_not_used_again(self, bench: TierBench) -> None:
        for number in range(12):
            bench.store(number)
        with pytest.MonkeyPatch.context() as patch:
            self.fail(patch, "read_all", OSError(errno.EIO, "broken"))
            assert bench.load(1) is MissReason.IO_ERROR
        assert bench.load(1) is MissReason.ABSENT
        for number in range(20, 50):
            bench.store(number)
        bench.tier.check()
        assert (bench.tier.usage().lost, bench.tier.usage().used) == (1, 11)

    def test_a_short_read_is_a_miss(self, bench: TierBench) -> None:
        bench.store(1)
        with pytest.MonkeyPatch.context() as patch:
            self.fail(patch, "read_all", files.ShortTransferError("short"))
            assert bench.load(1) is MissReason.SHORT_READ

    def test_floors_that_cannot_be_written_leave_the_slots_unused(self, bench: TierBench) -> None:
        for number in range(12):
            bench.store(number)
        with pytest.MonkeyPatch.context() as patch:
            self.fail(patch, "write_all", OSError(errno.EIO, "broken"))
            assert bench.store(20) is StoreOutcome.IO_ERROR
        bench.tier.check()
        assert bench.store(21) is StoreOutcome.STORED
        assert np.array_equal(bench.load(21), content(21))

    def test_the_free_space_floor_is_never_grown_into(self, tmp_path: Path) -> None:
        status = os.statvfs(tmp_path)
        everything = status.f_bavail * status.f_frsize
        tier = disk_tier(tmp_path, 12, free_floor_bytes=2 * everything)
        assert TierBench(tier).store(1) is StoreOutcome.FULL
        assert tier.usage().allocated_bytes == 0
        tier.check()
        tier.close()

    def test_a_file_size_limit_is_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(descriptor: int, offset: int, length: int) -> None:
            raise OSError(errno.EFBIG, "over the limit")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        tier = disk_tier(tmp_path, 12)
        assert TierBench(tier).store(1) is StoreOutcome.FULL
        assert not list(tmp_path.rglob("segment-*")), "the unfinished file stayed"
        tier.close()


class TestSegments:
    def test_many_segments_share_one_budget(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(disk_module, "_SEGMENT_BYTES", Geometry(BLOCK_BYTES, 5).reserved_bytes)
        monkeypatch.setattr(disk_module, "_MOST_SEGMENTS", 1000)
        bench = TierBench(disk_tier(tmp_path, 30))
        for number in range(80):
            assert bench.store(number) is StoreOutcome.STORED
        usage = bench.tier.usage()
        assert len(list(tmp_path.rglob("segment-*.kv"))) >= 5
        assert usage.allocated_bytes <= usage.budget_bytes
        assert usage.used >= 20
        reopened(bench, tmp_path, blocks=30)
        held = [number for number in range(80) if bench.tier.contains(name(number))]
        assert len(held) >= 20
        assert all(np.array_equal(bench.load(number), content(number)) for number in held)
        bench.tier.close()
