"""A container's limits are found where Linux writes them, whichever version of control groups it has."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from spillway.node_agent.container import available_memory_bytes, usable_cpus

MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def stat(inactive_mib: int) -> str:
    return f"anon 1\ninactive_file {inactive_mib * MIB}\ntotal_inactive_file {inactive_mib * MIB}\n"


CGROUPS_2 = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/cpu.max": "100000 100000\n",
    "sys/fs/cgroup/memory.max": str(64 * MIB),
    "sys/fs/cgroup/memory.current": str(40 * MIB),
    "sys/fs/cgroup/memory.stat": stat(8),
}
ABOVE_IT = {
    "proc/self/cgroup": "0::/pods/one\n",
    "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n",
    "sys/fs/cgroup/pods/one/memory.max": "max\n",
    "sys/fs/cgroup/pods/cpu.max": "50000 100000\n",
    "sys/fs/cgroup/pods/memory.max": str(64 * MIB),
    "sys/fs/cgroup/pods/memory.current": str(32 * MIB),
    "sys/fs/cgroup/pods/memory.stat": stat(0),
}
CGROUPS_1 = {
    "proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/docker/id\n1:memory:/docker/id\n0::/\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "60000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/docker/id/memory.limit_in_bytes": str(64 * MIB),
    "sys/fs/cgroup/memory/docker/id/memory.usage_in_bytes": str(48 * MIB),
    "sys/fs/cgroup/memory/docker/id/memory.stat": stat(16),
}


@pytest.mark.parametrize("files", [CGROUPS_2, ABOVE_IT, CGROUPS_1], ids=["version 2", "a group above", "version 1"])
def test_the_narrowest_limit_counts(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files)
    assert (usable_cpus(root), available_memory_bytes(root)) == (1, 32 * MIB)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/gone\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "odd", "sys/fs/cgroup/memory.max": "odd"},
        {
            "proc/self/cgroup": "1:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["no groups", "not mounted", "no limits", "unreadable", "no limits in version 1"],
)
def test_without_limits_the_machine_counts(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files)
    assert usable_cpus(root) == len(os.sched_getaffinity(0))
    assert 0 < available_memory_bytes(root) <= psutil.virtual_memory().total


def test_more_than_all_is_left_at_zero(tmp_path: Path) -> None:
    root = tree(tmp_path, CGROUPS_2 | {"sys/fs/cgroup/memory.current": str(99 * MIB)})
    assert available_memory_bytes(root) == 0
