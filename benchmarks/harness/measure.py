"""Run a command and measure the whole of it: wall and CPU seconds, and the peak memory of its process tree."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05


@dataclass(frozen=True)
class Measured:
    """A finished process. `return_code` is None where the time limit ended it."""

    return_code: int | None
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int


def tree_rss_bytes(pid: int) -> int:
    """Resident bytes of a process and its descendants; 0 once it is gone. Shared pages count once per process."""
    total, todo = 0, [pid]
    while todo:
        current = todo.pop()
        with contextlib.suppress(OSError):  # a process may end while it is looked at
            total += int(Path(f"/proc/{current}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for thread in Path(f"/proc/{current}/task").iterdir():
                todo += map(int, (thread / "children").read_text().split())
    return total


def measured(command: Sequence[str], env: dict[str, str], log: Path, limit_s: float) -> Measured:
    """Run a command to its end, or kill its process group after `limit_s` seconds. Output goes to `log`."""
    started, peak = time.perf_counter(), 0
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, process_group=0
        )
    late = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, tree_rss_bytes(process.pid))
        if not late and time.perf_counter() - started > limit_s:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(POLL_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    peak = max(peak, usage.ru_maxrss * 1024)
    return Measured(None if late else process.returncode, wall, usage.ru_utime + usage.ru_stime, peak)
