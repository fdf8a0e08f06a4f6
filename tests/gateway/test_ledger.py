"""A log that is cut or damaged anywhere yields every whole record and nothing else, and goes on from there."""

from __future__ import annotations

import resource
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.api.errors import StorageError
from spillway.gateway import sync
from spillway.gateway.ledger import Ledger
from spillway.gateway.records import FILE_HEADER_BYTES, HEADER_BYTES, MAGIC, Record, RecordKind, encode

KEY = 0x1234_5678_9ABC_DEF0
RECORDS = [
    Record(0, RecordKind.RESULT, b"first"),
    Record(3, RecordKind.ERROR, b""),
    Record(1, RecordKind.RESULT, b"an image: " + encode(Record(2, RecordKind.RESULT, b"fake"), KEY ^ 1)),
    Record(4, RecordKind.RESULT, MAGIC * 3),
]
NUM_LINES = 6


def write_log(path: Path, records: list[Record] = RECORDS) -> list[int]:
    """Writes a log and returns where each record ends."""
    ledger = Ledger(path, NUM_LINES, KEY)
    ends = []
    for record in records:
        assert ledger.append(record)
        ends.append(path.stat().st_size)
    ledger.close()
    return ends


def contents(ledger: Ledger) -> dict[int, Record]:
    found = {index: ledger.read(index) for index in range(NUM_LINES) if ledger.has(index)}
    return {index: record for index, record in found.items() if record is not None}


def by_index(records: list[Record]) -> dict[int, Record]:
    return {record.index: record for record in records}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "results.log"


def test_what_is_appended_is_read_back_now_and_after_reopening(log: Path) -> None:
    ledger = Ledger(log, NUM_LINES, KEY)
    for record in RECORDS:
        assert ledger.append(record)
        assert ledger.read(record.index) == record
    assert (ledger.num_results, ledger.num_errors) == (3, 1)
    assert ledger.undone().tolist() == [False, False, True, False, False, True]
    assert ledger.read(2) is None
    ledger.close()
    again = Ledger(log, NUM_LINES, KEY)
    assert contents(again) == by_index(RECORDS)
    assert (again.num_results, again.num_errors) == (3, 1)
    assert list(again.errors()) == [RECORDS[1]]
    assert (again.repairs.torn_bytes, again.repairs.corrupt_records, again.repairs.repeated_records) == (0, 0, 0)
    again.close()
    again.close()


def test_the_first_result_wins(log: Path) -> None:
    ledger = Ledger(log, NUM_LINES, KEY)
    assert ledger.append(RECORDS[0])
    size = log.stat().st_size
    assert not ledger.append(Record(0, RecordKind.ERROR, b"too late"))
    assert log.stat().st_size == size
    assert ledger.read(0) == RECORDS[0]
    ledger.close()


def test_the_first_result_wins_among_threads(log: Path) -> None:
    ledger = Ledger(log, 200, KEY)
    wins: list[int] = []

    def work(number: int) -> None:
        for index in range(200):
            if ledger.append(Record(index, RecordKind.RESULT, b"%d" % number * 50)):
                wins.append(index)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == list(range(200))
    ledger.close()
    again = Ledger(log, 200, KEY)
    assert again.num_results == 200
    assert again.repairs.repeated_records == 0
    again.close()


def test_a_log_cut_at_any_byte(log: Path) -> None:
    """A power cut or a kill in the middle of a write: the whole records stay, the torn one is gone, the log goes on."""
    ends = write_log(log)
    whole = log.read_bytes()
    for size in range(len(whole)):
        log.write_bytes(whole[:size])
        ledger = Ledger(log, NUM_LINES, KEY)
        kept = [record for record, end in zip(RECORDS, ends, strict=True) if end <= size]
        assert contents(ledger) == by_index(kept), size
        good_end = max([end for end in ends if end <= size], default=FILE_HEADER_BYTES)
        assert ledger.repairs.torn_bytes == max(0, size - good_end)
        for record in RECORDS[len(kept) :]:
            assert ledger.append(record)
        ledger.close()
        assert log.read_bytes() == whole, size


def test_zeros_after_the_end_are_cut(log: Path) -> None:
    """What some file systems leave after a power cut: the size was written, the data was not."""
    write_log(log)
    whole = log.read_bytes()
    log.write_bytes(whole + bytes(3_000_000))
    ledger = Ledger(log, NUM_LINES, KEY)
    assert contents(ledger) == by_index(RECORDS)
    assert ledger.repairs.torn_bytes == 3_000_000
    ledger.close()
    assert log.read_bytes() == whole


def test_a_flipped_bit_anywhere_costs_one_record(log: Path) -> None:
    ends = write_log(log)
    whole = log.read_bytes()
    starts = [FILE_HEADER_BYTES, *ends[:-1]]
    for position in range(len(whole)):
        log.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        ledger = Ledger(log, NUM_LINES, KEY)
        kept = [r for r, start, end in zip(RECORDS, starts, ends, strict=True) if not start <= position < end]
        assert contents(ledger) == by_index(kept), position
        in_last = starts[-1] <= position
        assert ledger.repairs.corrupt_records == (0 if in_last else 1)
        assert ledger.repairs.torn_bytes == (len(whole) - starts[-1] if in_last else 0)
        for record in RECORDS:
            ledger.append(record)
        assert contents(ledger) == by_index(RECORDS)
        ledger.close()


records = st.builds(
    Record,
    st.integers(0, NUM_LINES - 1),
    st.sampled_from(RecordKind),
    st.binary(max_size=60) | st.just(MAGIC + bytes(40)),
)


@given(
    st.lists(records, max_size=8),
    st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=40), st.booleans()), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_any_damage_leaves_only_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[Record],
    damage: list[tuple[int, bytes, bool]],
) -> None:
    log = tmp_path_factory.mktemp("ledger") / "log"
    ledger = Ledger(log, NUM_LINES, KEY)
    accepted = [record for record in written if ledger.append(record)]
    ledger.close()
    blob = log.read_bytes()
    for position, junk, insert in damage:
        position %= len(blob) + 1
        blob = blob[:position] + junk + blob[position if insert else position + len(junk) :]
    log.write_bytes(blob)
    ledger = Ledger(log, NUM_LINES, KEY)
    found = contents(ledger)
    assert all(record in accepted for record in found.values())
    assert len(accepted) - len(found) <= 2 * len(damage)
    for record in accepted:
        ledger.append(record)
    repaired = contents(ledger)
    ledger.close()
    again = Ledger(log, NUM_LINES, KEY)
    assert contents(again) == repaired == by_index(accepted)
    again.close()


def test_a_record_of_another_log_is_not_ours(log: Path, tmp_path: Path) -> None:
    write_log(log)
    other = Ledger(tmp_path / "other", NUM_LINES, KEY + 2)
    other.close()
    with log.open("r+b") as file, (tmp_path / "other").open("ab") as target:
        target.write(file.read()[FILE_HEADER_BYTES:])
    ledger = Ledger(tmp_path / "other", NUM_LINES, KEY + 2)
    assert contents(ledger) == {}
    ledger.close()


def test_repeated_and_foreign_lines_are_counted_and_ignored(log: Path) -> None:
    write_log(log)
    with log.open("ab") as file:
        file.write(encode(Record(0, RecordKind.RESULT, b"second"), KEY))
        file.write(encode(Record(NUM_LINES, RecordKind.RESULT, b"beyond"), KEY))
    ledger = Ledger(log, NUM_LINES, KEY)
    assert contents(ledger) == by_index(RECORDS)
    assert ledger.repairs.repeated_records == 2
    assert ledger.repairs.torn_bytes == 0
    ledger.close()


def test_damage_while_open_is_found_on_reading(log: Path) -> None:
    ends = write_log(log)
    ledger = Ledger(log, NUM_LINES, KEY)
    with log.open("r+b") as file:
        file.seek(ends[0] - 1)
        file.write(b"?")
    assert ledger.read(0) is None
    assert not ledger.has(0)
    assert (ledger.num_results, ledger.num_errors, ledger.repairs.corrupt_records) == (2, 1, 1)
    assert ledger.append(RECORDS[0])
    assert ledger.read(0) == RECORDS[0]
    ledger.close()
    again = Ledger(log, NUM_LINES, KEY)
    assert contents(again) == by_index(RECORDS)
    again.close()


def test_a_full_disk_is_an_error_that_leaves_the_log_whole(log: Path) -> None:
    """The limit on file size stands in for the disk: the kernel writes a part of the record, then refuses."""
    ledger = Ledger(log, NUM_LINES, KEY)
    ledger.append(RECORDS[0])
    size = log.stat().st_size
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + HEADER_BYTES + 10, before[1]))
        with pytest.raises(StorageError, match="cannot write a result"):
            ledger.append(Record(1, RecordKind.RESULT, b"x" * 1000))
        assert log.stat().st_size == size
        assert not ledger.has(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert ledger.append(Record(1, RecordKind.RESULT, b"x" * 1000))
    ledger.close()
    again = Ledger(log, NUM_LINES, KEY)
    assert (again.num_results, again.repairs.torn_bytes) == (2, 0)
    again.close()


class TestGroupSync:
    def test_a_write_is_synced_without_anyone_asking(self, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced = threading.Event()
        monkeypatch.setattr(sync.os, "fdatasync", lambda _: synced.set())
        with log.open("wb") as file:
            group = sync.GroupSync(file.fileno(), 0.01, 1000)
            assert not synced.wait(0.05)  # nothing written, nothing synced
            group.wrote(1)
            assert synced.wait(60)
            group.close()

    def test_many_bytes_do_not_wait_for_the_interval(self, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced = threading.Event()
        monkeypatch.setattr(sync.os, "fdatasync", lambda _: synced.set())
        with log.open("wb") as file:
            group = sync.GroupSync(file.fileno(), 3600, 1000)
            group.wrote(999)
            assert not synced.wait(0.05)
            group.wrote(1000)
            assert synced.wait(60)
            group.close()

    def test_closing_syncs(self, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        monkeypatch.setattr(sync.os, "fdatasync", calls.append)
        with log.open("wb") as file:
            group = sync.GroupSync(file.fileno(), 3600, 1000)
            group.wrote(10)
            assert group.synced_bytes == 0
            group.close()
            assert calls == [file.fileno()]
            assert group.synced_bytes == 10

    def test_a_failed_sync_is_never_forgotten(self, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        failing = [True]

        def fdatasync(_: int) -> None:
            if failing[0]:
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(sync.os, "fdatasync", fdatasync)
        with log.open("wb") as file:
            group = sync.GroupSync(file.fileno(), 3600, 1000)
            with pytest.raises(StorageError, match="Input/output error"):
                group.sync()
            failing[0] = False
            for call in (lambda: group.wrote(1), group.sync, group.close):
                with pytest.raises(StorageError):
                    call()


def test_memory_is_eight_bytes_a_line(log: Path) -> None:
    ledger = Ledger(log, 1_000_000, KEY)
    assert ledger._offsets.nbytes == 8_000_000
    ledger.close()
    assert log.stat().st_size == FILE_HEADER_BYTES
