"""Results can be read while the job runs, from any cursor, each once, and only once they cannot be lost any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_files import OPTIONS, answer, requests, write_input
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.gateway.job import Job
from spillway.gateway.tail import ResultPage, ResultTail

Row = tuple[int, bool, bytes]
"""Line, whether it belongs to the error file, and the row."""


def rows_of(page: ResultPage) -> list[Row]:
    rows = page.rows.splitlines(keepends=True)
    return [
        (index, place in page.errors, row) for place, (index, row) in enumerate(zip(page.indices, rows, strict=True))
    ]


def read_all(tail: ResultTail, end: int, page_bytes: int) -> list[Row]:
    rows: list[Row] = []
    position = 0
    while (page := tail.read(position, end, page_bytes)).indices:
        assert position < page.position <= end
        rows += rows_of(page)
        position = page.position
    return rows


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=12), st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_row_once_whatever_the_page_size(
    tmp_path_factory: pytest.TempPathFactory, pages: list[int], keep_reading: bool
) -> None:
    paths = write_input(tmp_path_factory.mktemp("tail"), [*requests(6), b"{"])
    rows: list[Row] = []
    with Job.open(paths, OPTIONS) as job:
        tail, cursor = job.tail, ""
        for line in job.pending():
            job.complete(line.index, answer(line))
            if keep_reading:
                page = tail.read(tail.position(cursor), job.durable_bytes, pages[0])
                cursor = tail.cursor(page.position)
                rows += rows_of(page)
        job.seal(keep_log=True)
        end = tail.log.stat().st_size
    for size in [*pages, 10**9]:
        page = tail.read(tail.position(cursor), end, size)
        cursor = tail.cursor(page.position)
        rows += rows_of(page)
    assert [index for index, _, _ in rows] == [6, 0, 3, 1, 4, 2, 5]  # the error of intake, then in order of running
    by_file = {True: b"", False: b""}
    for _, is_error, row in sorted(rows):
        by_file[is_error] += row
    assert by_file == {True: paths.errors.read_bytes(), False: paths.output.read_bytes()}


def test_a_page_is_as_large_as_was_asked_for_and_never_empty(tmp_path: Path) -> None:
    with Job.open(write_input(tmp_path, requests(20)), OPTIONS) as job:
        for line in job.pending():
            job.complete(line.index, b'{"text":"%b"}' % (b"x" * 1000 * (line.index % 3)))
        job.seal(keep_log=True)
    end = job.tail.log.stat().st_size
    assert len(read_all(job.tail, end, 1)) == 20  # one by one
    position = 0
    while (page := job.tail.read(position, end, 3000)).indices:
        assert len(page.rows) <= 3000
        assert page.position - position <= 3000
        position = page.position
    assert len(job.tail.read(0, end, end).indices) == 20


@pytest.mark.parametrize("page_bytes", [1, 1000, 10**6])
@pytest.mark.parametrize("place", ["header", "payload"])
def test_what_is_damaged_is_passed_over(tmp_path: Path, place: str, page_bytes: int) -> None:
    with Job.open(write_input(tmp_path, requests(5)), OPTIONS) as job:
        for line in job.pending():
            job.complete(line.index, answer(line))
        job.seal(keep_log=True)
    tail = job.tail
    content = tail.log.read_bytes()
    whole = read_all(tail, len(content), page_bytes)
    hit = content.index(whole[2][2]) + (10 if place == "payload" else -20)
    tail.log.write_bytes(content[:hit] + bytes([content[hit] ^ 1]) + content[hit + 1 :])
    assert read_all(tail, len(content), page_bytes) == whole[:2] + whole[3:]


def test_only_what_is_durable_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spillway.gateway.ledger.SYNC_INTERVAL_S", 3600)
    paths = write_input(tmp_path, requests(3))
    with Job.open(paths, OPTIONS) as job:
        job.complete(0, b"{}")
        assert job.tail.read(0, job.durable_bytes, 10**6) == ResultPage(b"", [], [], 0)
        assert job._ledger is not None
        job._ledger.sync()
        page = job.tail.read(0, job.durable_bytes, 10**6)
        assert page.indices == [0]
        nothing = ResultPage(b"", [], [], page.position)
        assert job.tail.read(page.position, job.durable_bytes, 10**6) == nothing
    with Job.open(paths, OPTIONS) as again:
        assert again._ledger is not None
        again._ledger.sync()
        assert again.tail.read(page.position, again.durable_bytes, 10**6) == nothing


@pytest.mark.parametrize("cursor", ["x", "10", "10-", "10-0000000000000000", "-1-0", "10-" + "f" * 10_000, "é"])
def test_made_up_cursors_are_refused(tmp_path: Path, cursor: str) -> None:
    with Job.open(write_input(tmp_path, requests(1)), OPTIONS) as job, pytest.raises(ValueError):  # noqa: PT011 - it says no more
        job.tail.position(cursor)
