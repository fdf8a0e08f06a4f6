"""The judge of chaos runs: it must find what it is there to find."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storechaos import faults, schedule
from storechaos.burst import BLOCK_BYTES, IDENTITY, Caller, universe
from storechaos.ground import missing, scratch, walls
from storechaos.ledger import Books, Counts, Findings, Lease, SharedIndex, Strike, content, stray_entries

from spillway.kvstore import BlockStore, Deadlines, Faults, StoreConfig
from spillway.kvstore.sealing import Sealer

BLOCK = bytes(range(32))
HELD = {"a": {BLOCK: 1}}
LEASES = {1: Lease("a", 4), 2: Lease("b", 2)}


def place(number: int, generation: int, bits: int) -> bytes:
    return struct.pack(">IIII", number, generation, bits, 1)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_contents_tell_blocks_and_places_apart(one: bytes, other: bytes) -> None:
    words = content(one, 4096).view("<u8")
    assert len(set(words.tolist())) == len(words)
    if one[:16] != other[:16]:
        assert not np.array_equal(words, content(other, 4096).view("<u8"))


@pytest.fixture
def bad_disk(tmp_path: Path) -> Iterator[BlockStore]:
    """Every load from this disk has a flipped bit."""
    config = StoreConfig(
        BLOCK_BYTES, IDENTITY, host_bytes=9 * (BLOCK_BYTES + 1024), disk_bytes=8 << 20, disk_dir=tmp_path,
        disk_free_floor_bytes=0, disk_faults=Faults(bit_flip=1.0), deadlines=Deadlines(put_s=60, load_s=60),
    )  # fmt: skip
    with BlockStore.open(config) as store:
        yield store


def test_a_store_that_verifies_passes(bad_disk: BlockStore) -> None:
    counts = Caller(bad_disk, universe()[:2], 1).work(60, most=1000)
    assert counts.hits > 0
    assert bad_disk.stats().tiers["disk"].verify_failures > 0
    assert Findings(counts).violations() == []


def test_a_store_that_does_not_verify_is_caught(bad_disk: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sealer, "verify", lambda self, block, header, stored: None)
    counts = Caller(bad_disk, universe()[:2], 1).work(60, most=1000)
    assert counts.wrong > 0
    assert "wrong bytes" in Findings(counts).violations()[0]


def test_a_store_that_writes_after_its_call_returned_is_caught(bad_disk: BlockStore) -> None:
    caller = Caller(bad_disk, universe()[:2], 1)
    caller.work(60, most=100)
    caller._buffers[3][100] = 1
    assert caller.work(0).written_late == 1


def test_what_escapes_from_a_store_is_a_violation(bad_disk: BlockStore) -> None:
    bad_disk.close()
    counts = Caller(bad_disk, universe()[:2], 1).work(0.05)
    assert any("StoreClosedError" in each for each in Findings(counts).violations())


@pytest.mark.parametrize(
    ("entries", "blamed"),
    [
        ({BLOCK: place(1, 4, 1)}, []),
        ({BLOCK: place(1, 4, 3)}, ["index: 1 entries that differ from what a holds"]),
        ({}, ["index: 1 entries that differ from what a holds"]),
        ({BLOCK: place(1, 4, 1), BLOCK[::-1]: place(1, 4, 1)}, ["index: 1 entries that differ from what a holds"]),
        ({BLOCK: place(1, 4, 1) + place(2, 2, 1)}, ["index: 1 entries of the dead node b"]),
        ({BLOCK: place(1, 4, 1) + place(7, 1, 1)}, ["index: 1 entries of the dead node 7"]),
        ({BLOCK: place(1, 4, 1) + place(1, 3, 1)}, ["index: 1 entries of an older generation of a"]),
    ],
)
def test_every_entry_is_held_against_what_is_there(entries: dict[bytes, bytes], blamed: list[str]) -> None:
    assert stray_entries(SharedIndex(LEASES, entries), HELD) == blamed


@pytest.mark.parametrize(("certain", "blamed"), [(True, True), (False, False)])
def test_a_fault_that_no_metric_shows_is_a_violation(certain: bool, blamed: bool) -> None:
    books = Books()
    books.enter(0, 1, {"disk.verify_failures": 2})
    strikes = [Strike("bits flipped", 0, at, ["disk.verify*"], certain=certain) for at in (1, 2)]
    for strike in strikes:
        strike.before = strike.sum(books)
    books.enter(0, 1, {"disk.verify_failures": 3})
    strikes[0].after = strikes[0].sum(books)
    assert bool(Findings(strikes=strikes).violations()) is blamed
    strikes[0].after = 0
    assert Findings(strikes=strikes).violations()


def test_counters_of_a_killed_process_still_count() -> None:
    books = Books()
    books.enter(0, 1, {"writer.resyncs": 5})
    books.enter(0, 2, {"writer.resyncs": 1})
    books.enter(1, 1, {"writer.resyncs": 10})
    assert books.total("writer.*", 0) == 6
    assert books.total("writer.*") == 16


def test_counts_add_up_and_the_slowest_stays() -> None:
    counts = Counts(hits=1, slowest_get_s=2.0, failures=["x"])
    counts.add(Counts(hits=2, slowest_get_s=1.0, failures=["y"]))
    assert counts == Counts(hits=3, slowest_get_s=2.0, failures=["x", "y"])


@given(st.integers(), st.integers(min_value=2, max_value=6))
def test_every_fault_strikes_and_never_two_in_one_place(seed: int, workers: int) -> None:
    planned = schedule.rounds(faults.KINDS, workers, 0, Random(seed))
    assert sorted(kind.name for each in planned for kind, _ in each) == sorted(kind.name for kind in faults.KINDS)
    for each in planned:
        assert 1 <= len(each) <= 2
        assert len({worker for _, worker in each}) == len(each)
        assert all((worker == -1) == (kind.site == faults.REDIS) for kind, worker in each)


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_has_is_not() -> None:
    killed = "import os, signal; from storechaos.ground import scratch\nwith scratch() as made:\n"
    killed += "    print(made, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", killed], cwd=Path(__file__).parent, capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert left.exists()
    with scratch() as living:
        assert not left.exists()
        with scratch():
            assert living.exists()
    assert not living.exists()


def test_no_process_outlives_its_driver() -> None:
    if lacks := missing():
        pytest.skip(lacks)
    mark = f"/tmp/no-process-outlives-{time.monotonic_ns()}"
    script = f"sleep 1000 & exec -a {mark} sleep 1000"
    outer = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    driver = subprocess.Popen([sys.executable, "-c", outer, *walls(), "bash", "-c", script])
    try:
        _wait(lambda: _running(mark))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        _wait(lambda: not _running(mark))
    finally:
        driver.kill()


def _running(mark: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(mark.encode() + b"\0"):
                return True
        except OSError:
            continue  # it has just ended
    return False


def _wait(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)
