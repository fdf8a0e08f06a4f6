"""What a cluster has in the kernel: network namespaces, links, cgroups, mounts. All carry the ground's name.

Enter a namespace with `nsenter`, never with `ip netns exec`, which mounts /sys anew and hides the cgroups.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from testcluster.errors import ClusterError

_CGROUPS = Path("/sys/fs/cgroup")
_GONE_S = 10.0


def run(*argv: str) -> str:
    """What the command prints; ClusterError with its standard error if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def inside(namespace: str, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` in a network namespace; nsenter execs, so the pid is the program's own."""
    return ["nsenter", f"--net=/var/run/netns/{namespace}", *argv] if namespace else list(argv)


def add_bridge(name: str, cidr: str) -> None:
    """A bridge in our own namespace, with an address on it."""
    run("ip", "link", "add", name, "type", "bridge")
    run("ip", "address", "add", cidr, "dev", name)
    run("ip", "link", "set", name, "up")


def add_namespace(name: str, bridge: str, address: str, gateway: str) -> None:
    """A network namespace joined to `bridge` by a pair of links; the outer one has the namespace's name."""
    run("ip", "netns", "add", name)
    run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    run("ip", "link", "set", name, "master", bridge, "up")
    run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    run("ip", "-n", name, "link", "set", "eth0", "up")
    run("ip", "-n", name, "link", "set", "lo", "up")
    run("ip", "-n", name, "route", "add", "default", "via", gateway)
    run(*inside(name, ["sysctl", "-qw", "net.ipv4.ip_forward=1"]))


def add_cgroups(name: str) -> None:
    """One cgroup in every v1 controller. A fresh cpuset is empty, and nothing can join until it is filled."""
    for controller in _controllers():
        (controller / name).mkdir(exist_ok=True)
    cpuset = _CGROUPS / "cpuset"
    if cpuset.is_dir():
        for file in ("cpuset.mems", "cpuset.cpus"):
            (cpuset / name / file).write_text((cpuset / file).read_text())


def has_cgroup_v1() -> bool:
    """Whether controllers have hierarchies of their own, as this recipe needs."""
    return (_CGROUPS / "memory").is_dir()


def processes_in_cgroups(prefix: str) -> set[int]:
    """Processes in cgroups whose name starts with `prefix`, at any depth."""
    found: set[int] = set()
    for controller in _controllers():
        for top in controller.glob(f"{prefix}*"):
            for file in top.rglob("cgroup.procs"):
                with contextlib.suppress(FileNotFoundError, OSError):
                    found.update(int(pid) for pid in file.read_text().split())
    return found


def signal_all(pids: Sequence[int] | set[int], number: signal.Signals) -> None:
    """Send it to those that still run."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_cgroups(prefix: str) -> None:
    """kill -9 of all processes in such cgroups, until none is left."""
    deadline = time.monotonic() + _GONE_S
    while pids := processes_in_cgroups(prefix):
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {pids} in cgroups {prefix}* do not end")
        signal_all(pids, signal.SIGKILL)
        time.sleep(0.02)


def unmount_below(folder: Path) -> None:
    """Unmount everything that is mounted below `folder`, the deepest first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    targets = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    for target in sorted((t for t in targets if t.startswith(f"{folder}/")), reverse=True):
        run("umount", "--lazy", target)


def remove_all(folder: Path) -> None:
    """Everything of the ground in `folder` that is not a process of its own or a file."""
    prefix = folder.name
    kill_cgroups(prefix)
    unmount_below(folder)
    for namespace in Path("/var/run/netns").glob(f"{prefix}-*"):
        run("ip", "netns", "delete", namespace.name)
    for link in Path("/sys/class/net").glob(f"{prefix}*"):
        with contextlib.suppress(ClusterError):  # the outer end of a deleted namespace's link goes by itself
            run("ip", "link", "delete", link.name)
    for controller in (*_controllers(), _CGROUPS / "unified"):  # runc makes some in the empty v2 hierarchy too
        for top in controller.glob(f"{prefix}*"):
            _remove_cgroup(top)


def _remove_cgroup(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        Path(folder).rmdir()


def _controllers() -> list[Path]:
    """The v1 hierarchies; `cpu` and the like are links to the joint ones."""
    if not has_cgroup_v1():
        return []
    return [path for path in _CGROUPS.iterdir() if path.is_dir() and not path.is_symlink() and path.name != "unified"]
