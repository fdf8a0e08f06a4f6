"""Results can be read while the job runs, from any cursor, each once, and only once they cannot be lost any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_files import OPTIONS, answer, requests, write_input
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.gateway.job import Job
from spillway.gateway.tail import ResultRow


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=12), st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_row_once_whatever_the_page_size(
    tmp_path_factory: pytest.TempPathFactory, pages: list[int], keep_reading: bool
) -> None:
    paths = write_input(tmp_path_factory.mktemp("tail"), [*requests(6), b"{"])
    rows: list[ResultRow] = []
    with Job.open(paths, OPTIONS) as job:
        tail, cursor = job.tail, ""
        for line in job.pending():
            job.complete(line.index, answer(line))
            if keep_reading:
                some, position = tail.read(tail.position(cursor), job.durable_bytes, pages[0])
                cursor = tail.cursor(position)
                rows += some
        job.seal(keep_log=True)
        end = tail.log.stat().st_size
    for page in [*pages, 10**9]:
        some, position = tail.read(tail.position(cursor), end, page)
        cursor = tail.cursor(position)
        rows += some
    assert [row.index for row in rows] == [6, 0, 3, 1, 4, 2, 5]  # the error of intake, then in order of running
    by_file = {True: b"", False: b""}
    for row in sorted(rows, key=lambda row: row.index):
        by_file[row.is_error] += row.json
    assert by_file == {True: paths.errors.read_bytes(), False: paths.output.read_bytes()}


def test_only_what_is_durable_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spillway.gateway.ledger.SYNC_INTERVAL_S", 3600)
    paths = write_input(tmp_path, requests(3))
    with Job.open(paths, OPTIONS) as job:
        job.complete(0, b"{}")
        assert job.tail.read(0, job.durable_bytes, 10**6) == ([], 0)
        assert job._ledger is not None
        job._ledger.sync()
        rows, position = job.tail.read(0, job.durable_bytes, 10**6)
        assert [row.index for row in rows] == [0]
        assert job.tail.read(position, job.durable_bytes, 10**6) == ([], position)
    with Job.open(paths, OPTIONS) as again:
        assert again._ledger is not None
        again._ledger.sync()
        assert again.tail.read(position, again.durable_bytes, 10**6) == ([], position)


@pytest.mark.parametrize("cursor", ["x", "10", "10-", "10-0000000000000000", "-1-0", "10-" + "f" * 10_000, "é"])
def test_made_up_cursors_are_refused(tmp_path: Path, cursor: str) -> None:
    with Job.open(write_input(tmp_path, requests(1)), OPTIONS) as job, pytest.raises(ValueError):  # noqa: PT011
        job.tail.position(cursor)
