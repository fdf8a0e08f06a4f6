"""kill -9 at any point: run again until it ends, and every line has exactly one result, the same as in a quiet run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_files import names, requests, run, write_input

from spillway.gateway.manifest import Manifest
from spillway.gateway.paths import JobPaths

DURABLE_CALLS = ("open", "mkdir", "pwrite", "fsync", "fdatasync", "ftruncate", "replace", "unlink")
LINES = [*requests(4), b"{", b"", requests(1)[0], *requests(7)[5:]]


def run_in_child(paths: JobPaths, kill_at: int, *, after: bool) -> bool:
    """Runs the job in a fork that kills itself at its n-th call to the file system. True if it came through."""
    child = os.fork()
    if child == 0:
        try:
            _kill_at(kill_at, after)
            run(paths)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 — reported by the exit status
            os.write(2, repr(error).encode())
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


def _kill_at(number: int, after: bool) -> None:
    calls = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            mine = calls == number
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **kwargs)
            finally:
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    for name in DURABLE_CALLS:
        setattr(os, name, deadly(getattr(os, name)))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Output and errors of a run that nobody disturbed, with the time of the job taken out."""
    paths = write_input(tmp_path_factory.mktemp("quiet"), LINES)
    run(paths)
    return results(paths)


def results(paths: JobPaths) -> tuple[bytes, bytes]:
    loaded = Manifest.load(paths.directory / "manifest.json")
    assert loaded is not None
    manifest, _ = loaded
    assert manifest.sealed is not None
    return paths.output.read_bytes().replace(b'"created":%d' % manifest.created, b""), paths.errors.read_bytes()


def check_settled(paths: JobPaths, quiet: tuple[bytes, bytes]) -> None:
    assert results(paths) == quiet
    assert {path.name for path in paths.directory.iterdir()} == {"lock", "manifest.json", "manifest.json.copy"}
    assert {path.name for path in paths.output.parent.iterdir()} == {
        paths.input.name,
        paths.output.name,
        paths.errors.name,
        paths.directory.name,
    }


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_once_at_every_call_to_the_file_system(tmp_path: Path, quiet: tuple[bytes, bytes], after: bool) -> None:
    number, came_through = 0, False
    while not came_through:
        number += 1
        directory = tmp_path / str(number)
        directory.mkdir()
        paths = write_input(directory, LINES)
        came_through = run_in_child(paths, number, after=after)
        run(paths)
        check_settled(paths, quiet)
    assert number > 30  # it was killed in intake, while running, and while sealing


@pytest.mark.parametrize("seed", range(12))
def test_killed_again_and_again(tmp_path: Path, quiet: tuple[bytes, bytes], seed: int) -> None:
    dice = random.Random(seed)
    paths = write_input(tmp_path, LINES)
    kills = 0
    while not run_in_child(paths, dice.randint(1, 25), after=dice.random() < 0.5):
        kills += 1
    assert kills > 0
    check_settled(paths, quiet)
    assert run_in_child(paths, 10**9, after=False)  # and then it is complete
    check_settled(paths, quiet)


def test_killed_by_the_clock(tmp_path: Path) -> None:
    """The same with whole processes, a larger job, and no say in where it hits."""
    script = Path(__file__).with_name("batch_files.py")
    lines = requests(3000)
    paths = write_input(tmp_path, lines)
    dice = random.Random(1)
    kills = 0
    for patience_s in [dice.uniform(0.3, 1.5) for _ in range(6)] + [120.0]:
        child = subprocess.Popen([sys.executable, script, tmp_path])
        deadline = time.monotonic() + patience_s
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if child.poll() is None:
            child.kill()
            kills += 1
        child.wait()
    assert child.returncode == 0
    assert kills > 0
    assert names(paths.output) == [f"r{number}" for number in range(3000)]
    assert not paths.errors.exists()
