"""Real gateways and agents as processes, and a client that submits and waits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc

PATIENCE_S = 240.0
SERVER = Path(__file__).with_name("gateway_process.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], bool], what: str) -> None:
    """Polls; the limit only keeps a defect from hanging the suite."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.05)


class Processes:
    """Everything that a test started, ended with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, program: str, *arguments: str) -> None:
        """Another program, its words thrown away."""
        quiet = subprocess.DEVNULL
        self._running.append(subprocess.Popen([program, *arguments], stdout=quiet, stderr=quiet))

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        log = (self._folder / f"{name}.log").open("ab")
        with log:
            process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, env=os.environ | environment)
        self._running.append(process)
        return process

    def gateway(self, port: int, *more: str) -> subprocess.Popen[bytes]:
        """One that leases for 3 s, so that tests need not wait a minute for a dead agent."""
        process = self.start("gateway", str(SERVER), str(self._folder / "data"), str(port), *more)
        until(lambda: listening(port), "the gateway listens")
        return process

    def agent(self, model: Path, port: int, health: int, *more: str, **environment: str) -> subprocess.Popen[bytes]:
        command = ["-m", "spillway.cli.main", "agent", "--model", str(model), "--served-model", "tiny"]
        command += ["--gateway", f"127.0.0.1:{port}", "--health-listen", f"127.0.0.1:{health}", "--dtype", "float32"]
        command += ["--device", "cpu", "--device-kv", "2MiB", "--host-kv", "4MiB", "--max-batch-tokens", "64", *more]
        return self.start(f"agent-{health}", *command, **environment)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def stop(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def page(port: int, path: str) -> tuple[int, str]:
    """Status and text; 0 while nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def ready(health: int) -> bool:
    return page(health, "/readyz")[0] == 200


def metric(health: int, name: str) -> float:
    for row in page(health, "/metrics")[1].splitlines():
        if row.split(" ")[0] == name:
            return float(row.split(" ")[1])
    return 0.0


class Jobs:
    """A blocking client of the batch service."""

    def __init__(self, port: int, token: str = "") -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._stub: Any = batch_pb2_grpc.BatchServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def submit(self, lines: list[dict[str, Any]], model: str = "tiny") -> str:
        content = "".join(json.dumps(each) + "\n" for each in lines).encode()

        def messages() -> Iterator[batch_pb2.SubmitJobRequest]:
            yield batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model=model))
            yield batch_pb2.SubmitJobRequest(input=content)

        return str(self._stub.SubmitJob(messages(), metadata=self._metadata, wait_for_ready=True, timeout=60).name)

    def get(self, name: str) -> batch_pb2.Job:
        request = batch_pb2.GetJobRequest(name=name)
        return self._stub.GetJob(request, metadata=self._metadata, wait_for_ready=True, timeout=60)

    def cancel(self, name: str) -> None:
        self._stub.CancelJob(batch_pb2.CancelJobRequest(name=name), metadata=self._metadata, timeout=60)

    def completed(self, name: str) -> int:
        return int(self.get(name).lines.completed)

    def wait(self, name: str) -> batch_pb2.Job:
        until(lambda: self.get(name).state >= batch_pb2.Job.COMPLETED, "the job ends")
        return self.get(name)

    def output(self, name: str) -> dict[str, Any]:
        """What was answered, by custom_id, less what differs from job to job: ids and times."""
        request = batch_pb2.ReadFileRequest(name=name, file=batch_pb2.ReadFileRequest.OUTPUT)
        content = b"".join(each.data for each in self._stub.ReadFile(request, metadata=self._metadata, timeout=60))
        return answers(content)


def answers(content: bytes) -> dict[str, Any]:
    rows = [json.loads(row) for row in content.splitlines()]
    found = {row["custom_id"]: row["response"]["body"] for row in rows}
    assert len(found) == len(rows), "a line has two results"
    for body in found.values():
        body.pop("created")
        body.pop("id")
    return found


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """Ends what was started inside."""
    started = Processes(folder)
    try:
        yield started
    finally:
        started.stop()
