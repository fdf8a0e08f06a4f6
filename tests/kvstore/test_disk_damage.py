"""A disk directory that was damaged while no store was open on it: what is left is served, what is not is counted."""

from pathlib import Path

import numpy as np
import pytest
from kv_factories import blank, content, name, store_config

from spillway.kvstore import BlockStore
from spillway.kvstore.tiers.disk import tier as disk_module
from spillway.kvstore.tiers.disk.segment import Geometry

BLOCKS = 20
PAGE_BYTES = 4096


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    """Of a closed store with `BLOCKS` blocks."""
    with BlockStore.open(store_config(tmp_path, disk=BLOCKS)) as store:
        assert all(store.put_many([(name(number), content(number)) for number in range(BLOCKS)]))
        assert store.flush()
    (path,) = tmp_path.glob("share-00/segment-*.kv")
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def reopen(directory: Path) -> tuple[int, int]:
    """Old blocks that came back, all of them right, and damage counted; new blocks are taken in as ever."""
    with BlockStore.open(store_config(directory, disk=BLOCKS)) as store:
        found = get(store, range(BLOCKS))
        damaged = store.stats().tiers["disk"].damaged
        fresh = range(BLOCKS, 2 * BLOCKS)
        assert all(store.put_many([(name(number), content(number)) for number in fresh]))
        assert store.flush()
        assert get(store, fresh) > BLOCKS // 4
        assert store.stats().tiers["disk"].drops == {}
        store.check()
    with BlockStore.open(store_config(directory, disk=BLOCKS)) as store:
        assert get(store, fresh) > 0
    return found, damaged


def get(store: BlockStore, numbers: range) -> int:
    outs = [blank() for _ in numbers]
    found = store.get_many([(name(number), out) for number, out in zip(numbers, outs, strict=True)])
    for number, out, hit in zip(numbers, outs, found, strict=True):
        assert not hit or np.array_equal(out, content(number))
    return found.count(True)


@pytest.mark.parametrize("filling", [b"\xff", b"\x00", b"\x7f"])
def test_garbage_for_floors_costs_blocks_at_most(segment: Path, tmp_path: Path, filling: bytes) -> None:
    overwrite(segment, PAGE_BYTES, filling * PAGE_BYTES)
    (tmp_path / "share-00" / "share.json").unlink()
    found, _ = reopen(tmp_path)
    assert found in (0, BLOCKS)


def test_a_damaged_header_is_counted(segment: Path, tmp_path: Path) -> None:
    geometry = Geometry(8192, (segment.stat().st_size - 2 * PAGE_BYTES) // (8192 + PAGE_BYTES))
    assert geometry.file_bytes == segment.stat().st_size
    for slot in (0, 1):
        overwrite(segment, geometry.offset(slot) + 8192 + 30, b"\x55")
    found, damaged = reopen(tmp_path)
    assert damaged == 2
    assert found == BLOCKS - 2


def test_a_file_that_lost_its_end_is_counted(segment: Path, tmp_path: Path) -> None:
    with segment.open("r+b") as file:
        file.truncate(segment.stat().st_size // 2)
    assert reopen(tmp_path) == (0, 1)


def test_a_file_cut_under_a_living_store_makes_no_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows back when its slots are written again; a segment made in its place would then exceed the budget."""
    monkeypatch.setattr(disk_module, "_SEGMENT_BYTES", 6 * (8192 + PAGE_BYTES))
    monkeypatch.setattr(disk_module, "_GROWTH_PAUSE_S", 0.0)
    with BlockStore.open(store_config(tmp_path, disk=BLOCKS)) as store:
        for start in range(0, 200, 10):
            numbers = range(start, start + 10)
            store.put_many([(name(number), content(number)) for number in numbers])
            assert store.flush()
            get(store, numbers)
            for path in tmp_path.glob("share-00/segment-*.kv") if start == 30 else ():
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 4)
            store.check()
