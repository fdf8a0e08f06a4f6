"""What benchmarks need beside the store: a Redis of their own, and a second host behind a veth pair."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

NEAR, FAR = "10.232.0.1", "10.232.0.2"
_INSIDE = "SPILLWAY_BENCHMARK_INSIDE"


@contextmanager
def redis_server() -> Iterator[str]:
    """A fresh Redis as it comes, without saving; where its socket is. Clients reach it by ``unix://…``."""
    if shutil.which("redis-server") is None:
        raise SystemExit("no redis-server on PATH")
    with tempfile.TemporaryDirectory() as directory:
        socket = f"{directory}/redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--dir", directory]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with Redis(unix_socket_path=socket) as client:
                for _ in range(500):
                    try:
                        client.ping()
                        break
                    except RedisError:
                        time.sleep(0.02)
            yield socket
        finally:
            process.kill()
            process.wait()


def inside_namespaces() -> None:
    """Go on only inside namespaces of our own, which end with this process; the first call starts them and exits."""
    if os.environ.get(_INSIDE):
        return
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    walls = ["unshare", *user, "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    command = ["setpriv", "--pdeathsig", "KILL", "--", *walls, sys.executable, *sys.argv]
    raise SystemExit(subprocess.run(command, env=os.environ | {_INSIDE: "1"}, check=False).returncode)


def second_host() -> Sequence[str]:
    """Join a second network namespace to this one by a veth pair; the start of a command that runs there, as `FAR`."""
    holder = subprocess.Popen(["unshare", "--net", "--", "sleep", "infinity"])
    own = Path("/proc/self/ns/net").readlink()
    while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
        time.sleep(0.002)
    there = ("nsenter", f"--net=/proc/{holder.pid}/ns/net", "--")
    for command in (
        ("ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(holder.pid)),
        ("ip", "address", "add", f"{NEAR}/24", "dev", "near"),
        ("ip", "link", "set", "near", "up"),
        ("ip", "link", "set", "lo", "up"),
        (*there, "ip", "address", "add", f"{FAR}/24", "dev", "far"),
        (*there, "ip", "link", "set", "far", "up"),
    ):
        subprocess.run(command, check=True)
    return there
