"""A job gives every line exactly one result, in input order, however often it is stopped; and never mixes two jobs."""

from __future__ import annotations

import os
import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from batch_files import OPTIONS, RESTART, answer, drain, names, request, requests, rows, run, write_input
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.api.errors import (
    ErrorCode,
    InputChangedError,
    InputError,
    JobChangedError,
    JobCorruptError,
    JobError,
    JobLockedError,
    LineError,
    OutputExistsError,
    OutputPathError,
    SpillwayError,
    StorageError,
)
from spillway.gateway.job import Job, JobCounts
from spillway.gateway.paths import JobPaths


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


class TestResults:
    def test_results_are_in_input_order_whatever_the_order_of_running(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(20))
        with Job.open(paths, OPTIONS) as job:
            ran = []
            for line in job.pending():
                ran.append(line.custom_id)
                job.complete(line.index, answer(line))
            job.seal()
        assert ran != sorted(ran, key=lambda name: int(name[1:]))  # lines that share a prefix ran together
        assert names(paths.output) == [f"r{number}" for number in range(20)]
        first = rows(paths.output)[0]
        assert first["response"]["body"]["choices"][0]["text"] == "answer to r0"
        assert first["response"]["body"]["created"] == job.created

    def test_lines_that_share_a_prefix_are_pending_together(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(12))
        with Job.open(paths, OPTIONS) as job:
            assert [line.index for line in job.pending()] == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]

    def test_bad_lines_get_a_code_and_the_rest_runs(self, tmp_path: Path) -> None:
        lines = [request("a"), b"{", b"", request("b", bogus=1), request("a"), request("", "x"), request("c")]
        lines += [b"x" * 2000, request("b")]
        paths = write_input(tmp_path, lines)
        job = run(paths, replace(OPTIONS, max_line_bytes=1000))
        assert names(paths.output) == ["a", "c"]
        assert [(row["error"]["line"], row["error"]["code"], row["custom_id"]) for row in rows(paths.errors)] == [
            (2, "invalid_json", None),
            (4, "unknown_parameter", "b"),
            (5, "duplicate_custom_id", "a"),
            (6, "invalid_request", None),
            (8, "line_too_long", None),
            (9, "duplicate_custom_id", "b"),  # the first b failed, but its name was taken
        ]
        assert job.counts() == JobCounts(
            8,
            2,
            6,
            {
                "invalid_json": 1,
                "unknown_parameter": 1,
                "duplicate_custom_id": 2,
                "invalid_request": 1,
                "line_too_long": 1,
            },
        )

    def test_a_line_can_fail_while_running(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(3))
        with Job.open(paths, OPTIONS) as job:
            for line in job.pending():
                if line.index == 1:
                    assert job.fail(1, LineError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long", 0))
                else:
                    assert job.complete(line.index, answer(line))
            assert job.counts() == JobCounts(3, 2, 1, {"context_length_exceeded": 1})
            job.seal()
        (error,) = rows(paths.errors)
        assert (error["custom_id"], error["error"]["line"], error["response"]) == ("r1", 2, None)

    def test_without_errors_there_is_no_error_file(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        run(paths)
        assert not paths.errors.exists()

    def test_with_only_errors_there_is_an_empty_output(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, [b"{", b"}"])
        run(paths)
        assert paths.output.read_bytes() == b""
        assert len(rows(paths.errors)) == 2

    @pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n \n"])
    def test_line_endings(self, tmp_path: Path, ending: bytes) -> None:
        paths = write_input(tmp_path, requests(5), ending)
        paths.input.write_bytes(b"\xef\xbb\xbf" + paths.input.read_bytes().rstrip())  # a mark, and no last newline
        run(paths)
        assert names(paths.output) == [f"r{number}" for number in range(5)]

    def test_the_first_result_wins(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        with Job.open(paths, OPTIONS) as job:
            for line in job.pending():
                assert job.complete(line.index, answer(line))
                assert not job.complete(line.index, b'{"late":true}')
                assert not job.fail(line.index, LineError(ErrorCode.INTERNAL, "late", 0))
            job.seal()
            assert not job.complete(0, b'{"late":true}')
        assert not paths.errors.exists()
        assert b"late" not in paths.output.read_bytes()

    def test_a_line_can_be_completed_without_having_been_handed_out(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(1))
        with Job.open(paths, OPTIONS) as job:
            job.complete(0, b"{}")
            job.seal()
        (row,) = rows(paths.output)
        assert (row["custom_id"], row["response"]["body"]) == ("r0", {})

    def test_two_runs_of_one_job_differ_in_nothing_but_time(self, tmp_path: Path) -> None:
        outputs = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            paths = write_input(tmp_path / name, [*requests(5), b"{"])
            created = run(paths).created
            output = paths.output.read_bytes().replace(b'"created":%d' % created, b'"created":0')
            outputs.append((output, paths.errors.read_bytes()))
        assert outputs[0] == outputs[1]


class TestResuming:
    def test_results_are_kept_and_the_rest_is_pending(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, [*requests(10), b"{"])
        with Job.open(paths, OPTIONS) as job:
            pending = job.pending()
            for _ in range(4):
                line = next(pending)
                job.complete(line.index, answer(line))
            job.fail(8, LineError(ErrorCode.INTERNAL, "x", 0))
        with Job.open(paths, OPTIONS) as again:
            assert again.created == job.created
            assert again.counts() == JobCounts(11, 4, 2, {"invalid_json": 1, "internal_error": 1})
            assert drain(again) == 5
            again.seal()
        assert names(paths.output) == [f"r{number}" for number in range(10) if number != 8]
        assert names(paths.errors) == ["r8", None]

    def test_a_finished_job_is_complete(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, [*requests(3), b"{"])
        run(paths)
        before = paths.output.read_bytes(), paths.errors.read_bytes()
        with Job.open(paths, OPTIONS) as job:
            assert job.sealed
            assert list(job.pending()) == []
            assert job.seal() == job.counts() == JobCounts(4, 3, 1, {"invalid_json": 1})
        assert (paths.output.read_bytes(), paths.errors.read_bytes()) == before
        assert files_in(paths.directory) == {"lock", "manifest.json", "manifest.json.copy"}

    def test_a_touched_or_moved_input_is_the_same_input(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(3))
        Job.open(paths, OPTIONS).close()
        os.utime(paths.input, (1, 1))
        moved = JobPaths(paths.input.rename(tmp_path / "moved.jsonl"), paths.output, paths.errors)
        with Job.open(moved, OPTIONS) as job:
            assert drain(job) == 3

    @pytest.mark.parametrize("sealed", [False, True])
    def test_other_input_or_options_are_another_job(self, tmp_path: Path, sealed: bool) -> None:
        paths = write_input(tmp_path, requests(3))
        run(paths) if sealed else Job.open(paths, OPTIONS).close()
        changed = replace(OPTIONS, dtype="bfloat16", defaults={"temperature": 0.5})
        with pytest.raises(JobChangedError) as caught:
            Job.open(paths, changed)
        assert caught.value.differences == (
            "defaults.temperature was 'not set' and is 0.5",
            "dtype was 'float32' and is 'bfloat16'",
        )
        assert "--restart" in caught.value.hint
        content = paths.input.read_bytes()
        paths.input.write_bytes(content.replace(b"r1", b"r7"))
        with pytest.raises(JobChangedError, match="input has other content"):
            Job.open(paths, OPTIONS)
        paths.input.write_bytes(content)
        Job.open(paths, OPTIONS).close()

    @pytest.mark.parametrize("sealed", [False, True])
    def test_restart_begins_anew(self, tmp_path: Path, sealed: bool) -> None:
        paths = write_input(tmp_path, [b"{", *requests(3)])
        if sealed:
            run(paths)
        else:
            with Job.open(paths, OPTIONS) as job:
                drain(job)
        write_input(tmp_path, requests(2))
        with Job.open(paths, replace(RESTART, dtype="bfloat16")) as job:
            assert job.counts() == JobCounts(2, 0, 0)
            drain(job)
            job.seal()
        assert names(paths.output) == ["r0", "r1"]
        assert not paths.errors.exists()

    def test_an_output_that_was_removed_is_made_again(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, [b"{", *requests(3)])
        run(paths)
        before = paths.errors.read_bytes()
        paths.output.unlink()
        run(paths)
        assert len(rows(paths.output)) == 3
        assert paths.errors.read_bytes() == before

    def test_an_output_that_was_changed_is_not_passed_off_as_ours(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, [b"{", *requests(3)])
        run(paths)
        paths.errors.unlink()
        with pytest.raises(JobChangedError, match="error file"):
            Job.open(paths, OPTIONS)
        with paths.output.open("ab") as file:
            file.write(b"\n")
        with pytest.raises(JobChangedError, match="the output"):
            Job.open(paths, OPTIONS)

    def test_damaged_results_run_again(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(6))
        with Job.open(paths, OPTIONS) as job:
            drain(job)
        log = paths.directory / "results.log"
        blob = bytearray(log.read_bytes())
        blob[len(blob) // 2] ^= 1
        log.write_bytes(bytes(blob))
        with Job.open(paths, OPTIONS) as job:
            assert (job.repairs.corrupt_records, job.counts().pending) == (1, 1)
            drain(job)
            job.seal()
        assert names(paths.output) == [f"r{number}" for number in range(6)]

    def test_damage_found_while_sealing_does_not_reach_the_output(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(6))
        with Job.open(paths, OPTIONS) as job:
            drain(job)
            log = paths.directory / "results.log"
            with log.open("r+b") as file:
                file.seek(log.stat().st_size // 2)
                file.write(b"?")
            with pytest.raises(JobCorruptError, match="damaged"):
                job.seal()
            assert not paths.output.exists()
            assert drain(job) == 1
            job.seal()
        assert names(paths.output) == [f"r{number}" for number in range(6)]

    def test_a_damaged_table_is_made_anew_from_the_input(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, [*requests(2), b"{", requests(1)[0]])
        Job.open(paths, OPTIONS).close()
        table = (paths.directory / "lines.table").read_bytes()
        for blob in (table[:-1], table[:9], b"", table[:-1] + b"?", b"?" + table[1:], None):
            (paths.directory / "lines.table").unlink()
            if blob is not None:
                (paths.directory / "lines.table").write_bytes(blob)
            with Job.open(paths, OPTIONS) as job:
                assert job.repairs.table
                assert job.counts() == JobCounts(4, 0, 2, {"invalid_json": 1, "duplicate_custom_id": 1})
            assert (paths.directory / "lines.table").read_bytes() == table

    def test_a_damaged_manifest_is_taken_from_its_copy(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        with Job.open(paths, OPTIONS) as first:
            drain(first)
        manifest = (paths.directory / "manifest.json").read_bytes()
        damaged = (b"", b"{}", b"\xff", manifest[:-3], manifest.replace(b'"version": 2', b'"version": 1'), None)
        for blob in damaged:
            (paths.directory / "manifest.json").unlink()
            if blob is not None:
                (paths.directory / "manifest.json").write_bytes(blob)
            with Job.open(paths, OPTIONS) as job:
                assert job.repairs.sentences() == ["the manifest was damaged and was taken from its copy"]
                assert (job.created, job.counts().completed) == (first.created, 2)
            assert (paths.directory / "manifest.json").read_bytes() == manifest
        for blob in damaged[:-1]:
            assert blob is not None
            for name in ("manifest.json", "manifest.json.copy"):
                (paths.directory / name).write_bytes(blob)
            with pytest.raises(JobCorruptError, match=r"manifest\.json"):
                Job.open(paths, OPTIONS)
        Job.open(paths, RESTART).close()


class TestRefusals:
    """What cannot work is refused before any work, with a hint, and leaves nothing behind."""

    def refused(self, paths: JobPaths, kind: type[SpillwayError], match: str) -> None:
        before = files_in(paths.input.parent)
        with pytest.raises(kind, match=match) as caught:
            Job.open(paths, OPTIONS)
        assert caught.value.hint
        assert files_in(paths.input.parent) == before

    def test_paths(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        (tmp_path / "file").touch()
        (tmp_path / "dir").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to(paths.input)
        os.link(paths.input, tmp_path / "hard")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name, match in {
            "missing/out": "does not exist",
            "file/out": "not a directory",
            "dir": "is a directory",
            "pipe": "not a regular file",
            "in.jsonl": "same file as the input",
            "link": "same file as the input",
            "hard": "same file as the input",
            "loop": "cannot resolve",
            "file": "exists",
        }.items():
            kind = OutputExistsError if name == "file" else OutputPathError
            self.refused(replace(paths, output=tmp_path / name), kind, match)
            self.refused(replace(paths, errors=tmp_path / name), kind, match)
        self.refused(replace(paths, errors=paths.output), OutputPathError, "same file as the output")
        self.refused(replace(paths, input=tmp_path / "none"), InputError, "does not exist")
        self.refused(replace(paths, input=tmp_path / "dir"), InputError, "not a regular file")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_directory_without_permission(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        (tmp_path / "dir").mkdir(mode=0o500)
        self.refused(replace(paths, output=tmp_path / "dir" / "out"), OutputPathError, "not writable")

    def test_an_input_without_lines(self, tmp_path: Path) -> None:
        self.refused(write_input(tmp_path, [b"", b" "]), InputError, "no request line")

    def test_an_output_that_is_a_link_is_followed(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real" / "out.jsonl")
        run(replace(paths, output=tmp_path / "link"))
        assert names(tmp_path / "real" / "out.jsonl") == ["r0", "r1"]
        assert (tmp_path / "link").is_symlink()

    def test_restart_replaces_an_output_of_unknown_origin(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        paths.output.write_text("precious")
        with pytest.raises(OutputExistsError, match="--restart"):
            Job.open(paths, OPTIONS)
        with Job.open(paths, RESTART) as job:
            assert paths.output.read_text() == "precious"  # until there is something to put in its place
            drain(job)
            job.seal()
        assert names(paths.output) == ["r0", "r1"]

    def test_a_second_run_is_told_who_is_at_it(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        with Job.open(paths, OPTIONS), pytest.raises(JobLockedError) as caught:
            Job.open(paths, RESTART)
        assert caught.value.pid == os.getpid()
        Job.open(paths, OPTIONS).close()

    def test_sealing_before_the_end(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(2))
        with Job.open(paths, OPTIONS) as job, pytest.raises(JobError, match="2 lines have no result"):
            job.seal()
        assert not paths.output.exists()


class TestTheWorldChanges:
    def test_an_input_that_is_written_to_while_the_job_runs(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(3))
        content = paths.input.read_bytes()
        with Job.open(paths, OPTIONS) as job:
            pending = job.pending()
            next(pending)
            paths.input.write_bytes(content.replace(b"r", b"q"))
            with pytest.raises(InputChangedError):
                next(pending)
        with pytest.raises(JobChangedError):
            Job.open(paths, OPTIONS)
        paths.input.write_bytes(content)
        run(paths)
        assert names(paths.output) == ["r0", "r1", "r2"]

    def test_a_disk_that_is_full_while_sealing(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, [b"{", *requests(200)])
        job = Job.open(paths, OPTIONS)
        drain(job)
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            with pytest.raises(StorageError, match="cannot write"):
                job.seal()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert not paths.output.exists()
        job.close()
        run(paths)
        assert len(names(paths.output)) == 200

    def test_results_come_from_many_threads(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, requests(400))
        with Job.open(paths, OPTIONS) as job:
            lines = list(job.pending())
            threads = [
                threading.Thread(target=lambda: [job.complete(line.index, answer(line)) for line in lines])
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert job.seal() == JobCounts(400, 400, 0)
        assert names(paths.output) == [f"r{number}" for number in range(400)]

    def test_progress_covers_the_whole_input(self, tmp_path: Path) -> None:
        paths = write_input(tmp_path, [request("a", "x" * 3_000_000), request("b")])
        seen: list[tuple[int, int]] = []
        Job.open(paths, OPTIONS, lambda done, total: seen.append((done, total))).close()
        size = paths.input.stat().st_size
        assert seen
        assert all(done <= total == size for done, total in seen)


fates = st.sampled_from(["complete", "fail", "reopen", "skip"])


@given(st.lists(st.sampled_from(["ok", "bad", "blank", "twin"]), max_size=12), st.lists(fates, max_size=30))
@settings(max_examples=25, deadline=None)
def test_any_life_of_a_job(tmp_path_factory: pytest.TempPathFactory, lines: list[str], fates: list[str]) -> None:
    """Whatever lines there are and however the job is stopped: one result per line, all in order."""
    directory = tmp_path_factory.mktemp("life")
    blobs = {"bad": b"{", "blank": b"", "twin": request("twin")}
    paths = write_input(directory, [blobs.get(kind, request(f"r{n}")) for n, kind in enumerate(lines)] + [b"["])
    job = Job.open(paths, OPTIONS)
    failed = set()
    pending = job.pending()
    for fate in fates:
        if fate == "reopen":
            job.close()
            job = Job.open(paths, OPTIONS)
            pending = job.pending()
        elif (line := next(pending, None)) is not None and fate != "skip":
            if fate == "fail":
                job.fail(line.index, LineError(ErrorCode.INTERNAL, "x", 0))
                failed.add(line.custom_id)
            else:
                job.complete(line.index, answer(line))
    drain(job)
    counts = job.seal()
    job.close()
    twins = lines.count("twin")
    good = [f"r{n}" if kind == "ok" else "twin" for n, kind in enumerate(lines) if kind == "ok" or kind == "twin"]
    first = list(dict.fromkeys(good))
    assert names(paths.output) == [name for name in first if name not in failed]
    assert counts.failed == len(failed) + max(0, twins - 1) + lines.count("bad") + 1
    assert [row["error"]["line"] for row in rows(paths.errors)] == sorted(
        row["error"]["line"] for row in rows(paths.errors)
    )
    assert counts.total == counts.completed + counts.failed == len(lines) - lines.count("blank") + 1
