"""Redis servers of the tests' own: started on free ports, without a password, gone when the test is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

redis = pytest.importorskip("redis")


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55000:  # a cluster's bus listens at port + 10000
            return port


@dataclass
class RedisServer:
    """One server in ``directory``. ``options``: further settings."""

    directory: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("no redis-server on PATH")
        self.directory.mkdir(exist_ok=True)
        settings = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", "")
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([program, *settings, *self.options], stdout=log, stderr=log)
        self.wait()

    def wait(self) -> None:
        for _ in range(600):
            try:
                with redis.Redis(port=self.port) as client:
                    client.ping()
            except redis.exceptions.RedisError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError((self.directory / "log").read_text())

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def restart(self, *, with_data: bool) -> None:
        if with_data:
            with redis.Redis(port=self.port) as client:
                client.save()
        else:
            (self.directory / "dump.rdb").unlink(missing_ok=True)
        self.kill()
        self.start()


def start_cluster(directory: Path) -> list[RedisServer]:
    """Three masters, agreed."""
    servers = [
        RedisServer(directory / f"master-{number}", ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000"))
        for number in range(3)
    ]
    for server in servers:
        server.start()
    slots = [(0, 5461), (5462, 10922), (10923, 16383)]
    for server, (first, last) in zip(servers, slots, strict=True):
        with redis.Redis(port=server.port) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            for other in servers:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port)
    for server in servers:
        for _ in range(600):
            with redis.Redis(port=server.port) as client:
                info = client.execute_command("CLUSTER", "INFO")
                text = (
                    info
                    if isinstance(info, dict)
                    else dict(line.split(":") for line in info.decode().split() if ":" in line)
                )
            if text["cluster_state"] == "ok" and text["cluster_known_nodes"] == "3":
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the cluster did not form")
    return servers
