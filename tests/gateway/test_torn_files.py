"""A power cut tears the end of any file of a job: what was torn is mended and said, and every line has its result."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from batch_files import answer, request, requests
from hypothesis import given, settings
from hypothesis import strategies as st
from service_clients import coordinating

from spillway.gateway.job import Job
from spillway.gateway.options import JobOptions
from spillway.gateway.paths import JobPaths
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.job_trace import Report
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.spec import JobRequest
from spillway.gateway.service.state import State

# Bad lines of every kind: their errors are written at intake, and come back from the input if they are lost.
LINES = [*requests(6), b"{", requests(1)[0], b"", request("long", "x" * 3000), request("bad", temperature="hot")]
INPUT = b"\n".join(LINES)
SEALED_FILES = ("job.json", "output.jsonl", "errors.jsonl", "output.jsonl.spillway/manifest.json")
RUNNING_FILES = ("job.json", "output.jsonl.spillway/manifest.json", "output.jsonl.spillway/lines.table")
LOG = "output.jsonl.spillway/results.log"


@contextlib.asynccontextmanager
async def opened(data: Path) -> AsyncIterator[tuple[Coordinator, ServedJob]]:
    """A gateway without its wire, and the one job in it once that is ready."""
    async with coordinating(data) as coordinator:
        if not coordinator.page("t", 10, "")[0]:
            upload = coordinator.upload()
            upload.write(INPUT)
            await coordinator.submit("t", JobRequest(model="m"), upload)
        (job,), _ = coordinator.page("t", 10, "")
        while job.state is State.VALIDATING:
            await job.changed.wait()
        yield coordinator, job


async def drain(coordinator: Coordinator, job: ServedJob, lines: int) -> None:
    while lines and (grant := await coordinator.lease("w", "m", min(2, lines), 0)) is not None:
        lines -= len(grant.lines)
        coordinator.complete(
            grant.job_id, [(line.index, answer(line)) for line, _ in grant.lines], Report(grant.lease.id)
        )


async def run_until(data: Path, lines: int | None) -> tuple[ServedJob, list[int]]:
    """Answers so many lines, or all and waits for the end. Returns the job, and which lines readers of the log see."""
    async with opened(data) as (coordinator, job):
        await drain(coordinator, job, 10**6 if lines is None else lines)
        while lines is None and not job.state.final:
            await job.changed.wait()
        found = job.tail()
        indices = [] if found is None or lines is not None else found[0].read(0, found[1], 10**9).indices
        return job, sorted(indices)


def outcome(data: Path) -> tuple[bytes, bytes]:
    (folder,) = (data / "jobs").iterdir()
    output = (folder / "output.jsonl").read_bytes()
    created = {part.split(b",")[0] for part in output.split(b'"created":')[1:]}
    assert len(created) == 1
    return output.replace(b'"created":' + created.pop(), b""), (folder / "errors.jsonl").read_bytes()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """What a job comes to that runs in one process and that nobody disturbs."""
    folder = tmp_path_factory.mktemp("quiet") / "jobs" / "one"
    folder.mkdir(parents=True)
    paths = JobPaths(folder / "input.jsonl", folder / "output.jsonl", folder / "errors.jsonl")
    paths.input.write_bytes(INPUT)
    with Job.open(paths, JobOptions(model="m", dtype="as deployed")) as job:
        for line in job.pending():
            job.complete(line.index, answer(line))
        job.seal()
    return outcome(folder.parent.parent)


def tear(path: Path, share: float, zeros: bool) -> bool:
    """Cuts a file; with `zeros`, as if the size was kept but not the data. Whether anything was lost by that."""
    whole = path.read_bytes()
    kept = whole[: int(len(whole) * share)]
    path.write_bytes(kept + bytes(len(whole) - len(kept)) if zeros else kept)
    nothing = b"\n" if path.suffix == ".json" else b""  # JSON is whole without its last newline
    return path.read_bytes().removesuffix(nothing) != whole.removesuffix(nothing)


cuts = st.tuples(st.floats(0, 1, exclude_max=True), st.booleans())


@given(st.data(), st.integers(0, 7), st.lists(st.sampled_from([*RUNNING_FILES, LOG]), unique=True, min_size=1), cuts)
@settings(max_examples=25, deadline=None)
def test_files_torn_while_a_job_runs(
    tmp_path_factory: pytest.TempPathFactory,
    quiet: tuple[bytes, bytes],
    data: st.DataObject,
    done: int,
    files: list[str],
    cut: tuple[float, bool],
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    asyncio.run(run_until(folder, done))
    (home,) = (folder / "jobs").iterdir()
    torn = {file for file in files if tear(home / file, *data.draw(cuts) if len(files) > 1 else cut)}
    job, seen = asyncio.run(run_until(folder, None))
    assert outcome(folder) == quiet
    assert seen == list(range(10))
    for file, said in (("job.json", "spec"), ("manifest", "manifest"), ("table", "table of lines")):
        if any(file in name for name in torn):
            assert any(said in sentence for sentence in job.repairs), (torn, job.repairs)


@given(st.lists(st.sampled_from(SEALED_FILES), unique=True, min_size=1), cuts.filter(lambda cut: not cut[1]))
@settings(max_examples=15, deadline=None)
def test_files_torn_after_a_job_ended(
    tmp_path_factory: pytest.TempPathFactory, quiet: tuple[bytes, bytes], files: list[str], cut: tuple[float, bool]
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    asyncio.run(run_until(folder, None))
    (home,) = (folder / "jobs").iterdir()
    torn = {file for file in files if tear(home / file, *cut)}
    job, _ = asyncio.run(run_until(folder, None))
    assert outcome(folder) == quiet
    assert job.state is State.COMPLETED
    assert not job.trouble
    said = " ".join(job.repairs)
    for file, word in zip(SEALED_FILES, ("spec", "sealed files", "sealed files", "manifest"), strict=True):
        assert word in said or file not in torn


@pytest.mark.parametrize("cut", [(0.0, False), (0.5, True), (0.9, False)])
def test_any_copy_may_be_torn(tmp_path: Path, quiet: tuple[bytes, bytes], cut: tuple[float, bool]) -> None:
    asyncio.run(run_until(tmp_path, 3))
    (home,) = (tmp_path / "jobs").iterdir()
    for copy in ("job.json.copy", "output.jsonl.spillway/manifest.json.copy"):
        tear(home / copy, *cut)
    asyncio.run(run_until(tmp_path, None))
    assert outcome(tmp_path) == quiet


def test_results_that_cannot_be_restored_are_not_passed_off_as_whole(tmp_path: Path) -> None:
    asyncio.run(run_until(tmp_path, None))
    (home,) = (tmp_path / "jobs").iterdir()
    for file in ("output.jsonl", LOG):
        tear(home / file, 0.5, zeros=False)
    job, _ = asyncio.run(run_until(tmp_path, None))
    assert "log cannot restore them" in job.trouble
    with pytest.raises(Exception, match="cannot restore"):
        job.whole_file(job.folder.paths.output)


def test_a_job_that_cannot_be_understood_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    asyncio.run(run_until(tmp_path, 0))
    lost = tmp_path / "jobs" / "0123"
    lost.mkdir()
    (lost / "job.json").write_text("{")

    async def restart() -> list[str]:
        async with opened(tmp_path) as (coordinator, job):
            assert job.state is State.RUNNING
            return coordinator.unreadable

    (sentence,) = asyncio.run(restart())
    assert "0123/job.json cannot be understood" in sentence
    assert lost.exists()


def test_every_cut_of_the_log(tmp_path_factory: pytest.TempPathFactory, quiet: tuple[bytes, bytes]) -> None:
    """Also within the errors that intake wrote: those lines never run, so they must come back by themselves."""
    folder = tmp_path_factory.mktemp("log")
    asyncio.run(run_until(folder, 5))
    (home,) = (folder / "jobs").iterdir()
    paths = JobPaths(home / "input.jsonl", home / "output.jsonl", home / "errors.jsonl")
    whole = (home / LOG).read_bytes()
    for size in itertools.chain(range(0, 60), range(60, len(whole), 37)):
        (home / LOG).write_bytes(whole[:size])
        with Job.open(paths, JobOptions(model="m", dtype="as deployed")) as job:
            if size < 16:
                assert "all lines run again" in job.repairs.sentences()[0]
            for line in job.pending():
                job.complete(line.index, answer(line))
            assert job.counts().pending == 0
            assert job.counts().errors_by_code == {
                "invalid_json": 1,
                "duplicate_custom_id": 1,
                "invalid_parameter": 1,
            }
            assert job.tokens.completion_tokens == job.counts().completed == 7
