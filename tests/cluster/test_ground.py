"""A ground goes away with its owner: on close, or, after a kill -9 of the owner, with the next start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from testcluster.errors import ClusterError
from testcluster.ground import Ground

_OWNER = """
import sys, time
from pathlib import Path
from testcluster.ground import Ground
ground = Ground.open(Path(sys.argv[1]))
ground.start("child", ["sh", "-c", "sleep 600 & exec sleep 601"])
print(ground.pid("child"), ground.folder, flush=True)
time.sleep(600)
"""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def owner(tmp_path: Path) -> tuple[subprocess.Popen[str], int, Path]:
    """Another process that owns a ground in `tmp_path`, the child it started, and the ground's folder."""
    path = ":".join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path}
    )
    assert process.stdout is not None
    with process.stdout:
        pid, folder = process.stdout.readline().split()
    yield process, int(pid), Path(folder)
    process.kill()
    process.wait()
    Ground.open(tmp_path).close()


def test_the_next_start_sweeps_what_a_killed_owner_left(owner: tuple[subprocess.Popen[str], int, Path]) -> None:
    process, child, folder = owner
    process.kill()
    process.wait()
    assert _runs(child)
    assert folder.exists()
    Ground.open(folder.parent).close()
    assert not _runs(child)
    assert not folder.exists()


def test_a_living_owner_keeps_its_ground(owner: tuple[subprocess.Popen[str], int, Path]) -> None:
    _, child, folder = owner
    Ground.open(folder.parent).close()
    assert _runs(child)
    assert folder.exists()


def test_close_ends_children_of_children_too(tmp_path: Path) -> None:
    ground = Ground.open(tmp_path)
    ground.start("shell", ["sh", "-c", "sleep 600 & echo $!; wait"])
    while not (line := ground.log("shell").read_text().strip()):
        ground.check_alive()
    ground.close()
    assert not _runs(int(line))
    assert not ground.folder.exists()


def test_a_program_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    ground = Ground.open(tmp_path)
    try:
        ground.start("short", ["sh", "-c", "echo no such flag; exit 3"])
        while _runs(ground.pid("short")):
            pass
        with pytest.raises(ClusterError, match=r"short ended with 3: no such flag"):
            ground.check_alive()
    finally:
        ground.close()
