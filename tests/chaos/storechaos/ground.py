"""Where a run takes place: a namespace of its own for processes, mounts and network, that the kernel clears away.

The driver is the first process of its process namespace. Whatever ends it, kill -9 included, ends every process of the
run, and with them go the mounts, the networks and the clocks. Only a scratch directory can be left, and the next run
removes it. Who may not make namespaces as root makes them inside a user namespace, where that is allowed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redis import Redis

REDIS_HOST = "10.231.0.1"
REDIS_PORT = 6379
_PREFIX = "spillway-chaos-"
_SHIM = Path(__file__).with_name("clock.c")
_NEEDED = ("setpriv", "unshare", "nsenter", "ip", "mount", "redis-server")


def walls() -> list[str]:
    """The start of a command that runs what follows in namespaces of its own, and no longer than its parent lives."""
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    inside = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["setpriv", "--pdeathsig", "KILL", "--", "unshare", *user, *inside, "--"]


def missing() -> str:
    """Why no run is possible here; empty if one is."""
    absent = [program for program in _NEEDED if shutil.which(program) is None]
    if absent:
        return f"not on PATH: {', '.join(absent)}"
    tried = subprocess.run([*walls(), "true"], capture_output=True, check=False, timeout=30)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for one run. Those that killed runs left are removed first."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_PREFIX}*"):
        if (lock := _lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = _lock(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """Hold ``directory``; None if a living run does."""
    try:
        descriptor = os.open(directory / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None  # it is just being removed
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def run(*command: str) -> None:
    """Run a program to its end. Raises CalledProcessError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class Clock:
    """A wall clock that processes started under `environment` go by. Without a C compiler it cannot be moved."""

    def __init__(self, directory: Path, name: str) -> None:
        self._file = directory / f"{name}.offset"
        self._file.write_bytes(bytes(8))
        self._shim = directory / "clock.so"
        compiler = shutil.which("cc")
        if compiler and not self._shim.exists():
            run(compiler, "-O1", "-shared", "-fPIC", "-o", str(self._shim), str(_SHIM))

    @property
    def movable(self) -> bool:
        """Whether `move` has an effect."""
        return self._shim.exists()

    def environment(self) -> dict[str, str]:
        """What makes a process go by this clock."""
        return {"LD_PRELOAD": str(self._shim), "CHAOS_CLOCK": str(self._file)} if self.movable else {}

    def move(self, seconds: int) -> None:
        """Let it show real time plus ``seconds``, at once."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("<q", seconds))


class Network:
    """A bridge in the run's own network namespace, and a namespace behind it for each host."""

    def __init__(self) -> None:
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "hub", "type", "bridge")
        run("ip", "address", "add", f"{REDIS_HOST}/24", "dev", "hub")
        run("ip", "link", "set", "hub", "up")
        self._holders: dict[int, subprocess.Popen[bytes]] = {}
        self.can_be_silenced = shutil.which("nft") is not None

    def address(self, number: int) -> str:
        """Of host ``number``."""
        return f"10.231.0.{10 + number}"

    def add(self, number: int) -> None:
        """A host: its namespace lives as long as a process that holds it."""
        holder = subprocess.Popen(["unshare", "--net", "--", "sleep", "infinity"])
        self._holders[number] = holder
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
            time.sleep(0.002)
        port = f"port{number}"
        run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        run("ip", "link", "set", port, "master", "hub", "up")
        for command in (
            ("ip", "link", "set", "lo", "up"),
            ("ip", "address", "add", f"{self.address(number)}/24", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
        ):
            run(*self.on(number), *command)

    def on(self, number: int) -> Sequence[str]:
        """The start of a command that runs on a host."""
        return ("nsenter", f"--net=/proc/{self._holders[number].pid}/ns/net", "--")

    def cut(self, number: int) -> None:
        """Pull the cable of a host."""
        run("ip", "link", "set", f"port{number}", "down")

    def join(self, number: int) -> None:
        """Put it back."""
        run("ip", "link", "set", f"port{number}", "up")

    def silence(self, number: int) -> None:
        """Drop all that comes in: the host can send and hears nothing."""
        rules = "table inet chaos { chain in { type filter hook input priority 0; policy drop; }; }"
        run(*self.on(number), "nft", rules)

    def unsilence(self, number: int) -> None:
        """Let it hear again."""
        run(*self.on(number), "nft", "delete table inet chaos")


class RedisServer:
    """The run's Redis: reached by workers over the network, by the driver through a socket in the file system."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        directory.mkdir()
        self._directory = directory
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = directory / "redis.sock"

    def start(self) -> None:
        """Start with what was saved last, if anything was; returns when it answers."""
        where = ("--bind", "0.0.0.0", "--port", str(REDIS_PORT), "--unixsocket", str(self.socket))
        how = ("--protected-mode", "no", "--dir", str(self._directory), "--save", "")
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["redis-server", *where, *how], stdout=log, stderr=log, env=os.environ | self._clock.environment()
            )
        from redis.exceptions import RedisError

        until = time.monotonic() + 60
        while True:
            try:
                with self.client() as client:
                    client.ping()
            except RedisError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
            else:
                return

    def client(self) -> Redis:
        """A connection for the driver."""
        from redis import Redis

        return Redis(unix_socket_path=str(self.socket), socket_timeout=30)

    def save(self) -> None:
        """Write all data to its dump."""
        with self.client() as client:
            client.save()

    def forget(self) -> None:
        """Let the next start find nothing."""
        (self._directory / "dump.rdb").unlink(missing_ok=True)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self._process is not None:
            self._process.send_signal(number)


def python(module: str, *arguments: str) -> list[str]:
    """A command that runs a module of this package."""
    return [sys.executable, "-m", f"storechaos.{module}", *arguments]
