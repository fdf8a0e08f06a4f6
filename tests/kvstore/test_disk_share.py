"""Who may use a disk directory, and how much of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kv_factories import IDENTITY, OTHER_IDENTITY, content, disk_bytes, name, store_config

from spillway.kvstore import (
    BlockStore,
    ConfigError,
    KVIdentity,
    MountBusyError,
    MountError,
    MountMismatchError,
)
from spillway.kvstore.tiers.disk.mount import Share, open_share

BUDGET = 1 << 20


def share(directory: Path, sharers: int = 1, identity: KVIdentity = IDENTITY, budget: int = BUDGET) -> Share:
    return open_share(directory, budget, sharers, identity)


def test_a_second_store_on_a_directory_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    first = share(tmp_path)
    with pytest.raises(MountBusyError, match=f"process {os.getpid()}"):
        share(tmp_path)
    first.release()
    share(tmp_path).release()


def test_sharers_get_equal_parts_of_one_budget(tmp_path: Path) -> None:
    shares = [share(tmp_path, 3) for _ in range(3)]
    assert len({one.directory for one in shares}) == 3
    assert sum(one.budget_bytes for one in shares) <= BUDGET
    with pytest.raises(MountBusyError):
        share(tmp_path, 3)
    for one in shares:
        one.release()


def test_living_stores_must_agree_on_the_budget(tmp_path: Path) -> None:
    first = share(tmp_path, 2)
    with pytest.raises(MountMismatchError):
        share(tmp_path, 2, budget=2 * BUDGET)
    with pytest.raises(MountMismatchError):
        share(tmp_path, 3)
    first.release()
    share(tmp_path, 3, budget=2 * BUDGET).release()


def test_a_store_gets_the_share_that_held_its_blocks(tmp_path: Path) -> None:
    mine, other = share(tmp_path, 2), share(tmp_path, 2, OTHER_IDENTITY)
    mine.release()
    other.release()
    again = share(tmp_path, 2, OTHER_IDENTITY)
    assert again.directory == other.directory
    assert again.generation == other.generation + 1
    assert share(tmp_path, 2, IDENTITY).directory == mine.directory
    again.release()


def test_fewer_sharers_leave_no_share_behind(tmp_path: Path) -> None:
    for one in [share(tmp_path, 3) for _ in range(3)]:
        (one.directory / "segment-000000.kv").write_bytes(bytes(200_000))
        one.release()
    one = share(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("share-*")] == ["share-00"]
    assert one.allocated_bytes() <= one.budget_bytes
    one.release()


def test_the_directory_never_holds_more_than_its_budget(tmp_path: Path) -> None:
    """Two stores fill their shares; then one alone opens with half the budget."""
    config = store_config(tmp_path, disk=8, disk_bytes=disk_bytes(8, 2), disk_sharers=2)
    with BlockStore.open(config) as one, BlockStore.open(config) as two:
        for store in (one, two):
            store.put_many([(name(number), content(number)) for number in range(20)])
            assert store.flush()
            store.check()
        assert used_bytes(tmp_path) <= config.disk_bytes
    half = store_config(tmp_path, disk=8)
    with BlockStore.open(half) as store:
        assert used_bytes(tmp_path) <= half.disk_bytes
        assert store.match([name(19)]) in (0, 1)


def used_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*"))


HOLDER = """
import sys, time
from pathlib import Path
from kv_factories import IDENTITY
from spillway.kvstore.tiers.disk.mount import open_share

open_share(Path(sys.argv[1]), int(sys.argv[2]), 1, IDENTITY)
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_kept_out_until_this_one_dies(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path), str(BUDGET)]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(MountBusyError, match=f"process {holder.pid}"):
            share(tmp_path)
        holder.kill()
    share(tmp_path).release()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MountError, match="file"):
        share(tmp_path / "file")


def test_a_share_too_small_for_its_books_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        share(tmp_path, budget=1000)


def test_torn_books_are_written_anew(tmp_path: Path) -> None:
    share(tmp_path).release()
    (tmp_path / "mount.json").write_bytes(b'{"budget')
    (tmp_path / "share-00" / "share.json").write_bytes(b"")
    share(tmp_path).release()
