"""The folder and the processes of one cluster, and how they go away, whatever happened to who made them.

Every process carries the folder's path in its environment, so that the sweep finds it without a list that could be
incomplete. The owner holds a lock on the folder; a folder without an owner is swept by the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from testcluster import kernel
from testcluster.errors import ClusterError

_MARK = "SPILLWAY_CLUSTER_GROUND"
_NODE = "SPILLWAY_CLUSTER_NODE"
_KEPT = "kept"
_GONE_S = 10.0


class Ground:
    """A private folder with a lock, and processes that are found again by their mark."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        self.folder = folder
        self._lock = lock
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    def open(cls, base: Path | None = None) -> Ground:
        """A fresh one, after sweeping those under `base` whose owners are gone."""
        base = base or _default_base()
        base.mkdir(mode=0o700, exist_ok=True)
        if base.stat().st_uid != os.getuid():
            raise ClusterError(f"{base} belongs to another user")
        with _locked(base):
            for folder in base.iterdir():
                if folder.is_dir():
                    _sweep_if_abandoned(folder)
            folder = Path(tempfile.mkdtemp(prefix="g", dir=base))
            lock = (folder / "owner.lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(folder, lock)

    @property
    def id(self) -> str:
        """Nine letters that name this ground's things outside its folder: network namespaces, links, cgroups."""
        return self.folder.name

    def keep(self) -> None:
        """Let it live on without an owner, for people: until `remove_kept`."""
        (self.folder / _KEPT).touch()

    @staticmethod
    def remove_kept(base: Path | None = None) -> int:
        """Sweep those that were kept, and those whose owners are gone; how many were kept."""
        base = base or _default_base()
        if not base.exists():
            return 0
        with _locked(base):
            marks = list(base.glob(f"*/{_KEPT}"))
            for mark in marks:
                mark.unlink()
            for folder in base.iterdir():
                if folder.is_dir():
                    _sweep_if_abandoned(folder)
        return len(marks)

    @property
    def mark(self) -> dict[str, str]:
        """Variables by which processes of others are taken for this ground's, and go with it."""
        return {_MARK: str(self.folder)}

    def start(self, name: str, argv: Sequence[str], node: str = "") -> None:
        """Start a process with its output in `name`.log; it outlives us unless `close` or a sweep ends it.

        `node` names whose process it is, for `processes_of`; its children inherit that.
        """
        with self.log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
                env=os.environ | self.mark | {_NODE: node},
            )

    def log(self, name: str) -> Path:
        """Where the output of `name` goes."""
        return self.folder / f"{name}.log"

    def pid(self, name: str) -> int:
        """The process of `name`."""
        return self._processes[name].pid

    def kill(self, name: str) -> None:
        """kill -9, and gone when this returns."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def processes_of(self, node: str) -> list[int]:
        """What runs of a node besides its containers: what was started for it, and their children."""
        return _marked(f"{_MARK}={self.folder}", f"{_NODE}={node}")

    def forget(self, names: Sequence[str]) -> None:
        """Processes that someone has killed: collect them, and no longer expect them to live."""
        for name in names:
            self._processes.pop(name).wait()

    def check_alive(self) -> None:
        """Raises ClusterError with the end of the log of a process that has ended by itself."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                tail = self.log(name).read_text(errors="replace")[-2000:]
                raise ClusterError(f"{name} ended with {process.returncode}: {tail}")

    def close(self) -> None:
        """End every process of this ground and remove its folder."""
        _sweep(self.folder)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        self._lock.close()


def _default_base() -> Path:
    return Path(tempfile.gettempdir()) / f"spillway-cluster-{os.getuid()}"


@contextlib.contextmanager
def _locked(base: Path) -> Iterator[None]:
    with (base / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep_if_abandoned(folder: Path) -> None:
    if (folder / _KEPT).exists():
        return
    with (folder / "owner.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its owner lives
            return
        _sweep(folder)


def _sweep(folder: Path) -> None:
    deadline = time.monotonic() + _GONE_S
    while pids := _marked(f"{_MARK}={folder}"):
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {pids} of {folder} do not end")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    kernel.remove_all(folder)
    shutil.rmtree(folder)


def _marked(*marks: str) -> list[int]:
    """The live processes whose environment holds all of `marks`; a dead one shows no environment any more."""
    wanted = {mark.encode() for mark in marks}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or not ours to read
            continue
        if wanted <= set(environment.split(b"\0")):
            found.append(int(entry.name))
    return found
