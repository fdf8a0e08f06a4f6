"""What this process may use of the machine: a container's limits count, not the machine's size.

The limits stand in files of its control groups (Linux: cgroups, version 1 or 2), and each group above can be narrower.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def usable_cpus(root: Path = _ROOT) -> int:
    """CPUs that this process can keep busy: those it may run on, or the quota of its container if that is less.

    With more threads than that, all of them stand still for the rest of each period (100 ms, as a rule).
    """
    quotas = [_quota(folder) for folder in _folders(root, "cpu")]
    return max(1, min(len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in quotas if quota), 1 << 20))


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that can still be taken: what the machine has left, or what the container's limit leaves if less."""
    left = [_memory_left(folder) for folder in _folders(root, "memory")]
    return max(0, min(psutil.virtual_memory().available, *(each for each in left if each is not None), 1 << 62))


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The process's group under `controller`, and those above it. In a container the upper ones may not be there."""
    try:
        rows = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for row in rows:
        _, names, path = row.split(":", 2)
        if names and controller not in names.split(","):
            continue
        tops = (mounted / names, mounted / controller) if names else (mounted, mounted / "unified")
        inside = Path(path.lstrip("/"))
        for top in tops:
            for each in (inside, *inside.parents):
                if (top / each).is_dir():
                    yield top / each


def _quota(folder: Path) -> float | None:
    """CPUs, or None if there is no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _memory_left(folder: Path) -> int | None:
    """Bytes below the limit; pages of files that nobody uses count as free, since they make room by themselves."""
    newer = (folder / "memory.max").exists()
    limit, used, cached = (
        ("memory.max", "memory.current", "inactive_file")
        if newer
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        figures = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
        return int(most) - int((folder / used).read_text()) + int(figures.get(cached, 0))
    except (OSError, ValueError):
        return None
