"""Gateways and operators as processes, for tests that kill, freeze and restart them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.api.lines import BatchLine, parse_line
from spillway.api.results import BodyHead, Choice, Usage, completion_body
from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc
from spillway.operator.config import OperatorConfig

PATIENCE_S = 60.0
SPILLWAY = (sys.executable, "-m", "spillway.cli.main")
QUICK = """
import asyncio, logging, sys
from pathlib import Path
from spillway.operator.config import OperatorConfig
from spillway.operator.leadership import LeaseTimes
from spillway.operator.process import Process, run
logging.basicConfig(level=logging.INFO)
asyncio.run(run(Process(OperatorConfig.load(Path(sys.argv[1])), sys.argv[2], None, LeaseTimes(4.0, 0.5, 2.5))))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lines(count: int) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": "What follows?"}]}
    row = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    return "".join(json.dumps({"custom_id": f"line-{number}", **row}) + "\n" for number in range(count))


class GatewayProcess:
    """`spillway serve` on one port, and what a client and an agent would ask of it."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder, self.port, self._more = folder, free_port(), more
        self.address = f"127.0.0.1:{self.port}"
        self.inputs = folder / "inputs"
        """Where it fetches inputs from."""
        self.inputs.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel = grpc.insecure_channel(self.address, [("grpc.max_reconnect_backoff_ms", 200)])
        self._batch: Any = batch_pb2_grpc.BatchServiceStub(self._channel)
        self._worker: Any = worker_pb2_grpc.WorkerServiceStub(self._channel)

    def start(self) -> None:
        command = [*SPILLWAY, "serve", "--jobs-dir", str(self.folder / "jobs"), "--listen", self.address]
        command += ["--input-source", f"file://{self.inputs}", *self._more]
        with (self.folder / "gateway.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + PATIENCE_S
        while not self._listens():
            assert time.monotonic() < deadline_s, (self.folder / "gateway.log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self._channel.close()
        self.thaw()
        self.kill()

    def jobs(self) -> list[batch_pb2.Job]:
        """All of them, newest first."""
        answer = self._batch.ListJobs(batch_pb2.ListJobsRequest(page_size=1000), timeout=20, wait_for_ready=True)
        return list(answer.jobs)

    def of(self, uid: str) -> list[batch_pb2.Job]:
        return [job for job in self.jobs() if job.labels["spillway.dev/uid"] == uid]

    def delete(self, name: str) -> None:
        self._batch.DeleteJob(batch_pb2.DeleteJobRequest(name=name))

    def cancel(self, name: str) -> None:
        self._batch.CancelJob(batch_pb2.CancelJobRequest(name=name))

    def answer(self, model: str, count: int) -> int:
        """Works on that many lines of a model, as an agent would; how many there were."""
        request = worker_pb2.LeaseRequest(worker="test", model=model, max_lines=count)
        request.wait.seconds = 20
        leased = self._worker.Lease(request, timeout=40)
        results = [worker_pb2.CompleteRequest.Result(index=each.index, body=_body(each)) for each in leased.lines]
        if results:
            job = leased.lines[0].job
            self._worker.Complete(worker_pb2.CompleteRequest(job=job, lease=leased.lease, results=results))
        return len(results)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def _body(line: worker_pb2.LeasedLine) -> bytes:
    parsed = parse_line(line.request, line.line_number)
    assert isinstance(parsed, BatchLine)
    head = BodyHead(line.response_id, line.created, parsed.body.model)
    return completion_body(head, [Choice(0, f"answer to {parsed.custom_id}", "stop")], Usage(1, 1))


def config(address: str = "gateway:7400", **more: Any) -> OperatorConfig:
    agents = {"image": "spillway-agent:test"} | more.pop("agents", {})
    whole = {"gateway": {"address": address}, "agents": agents, "redis": {"image": "redis:test"}}
    return OperatorConfig.model_validate(whole | more)


class OperatorProcess:
    """`spillway operator`; or a quick one, whose Lease runs out in seconds instead of a quarter of a minute."""

    def __init__(self, folder: Path, gateway: str, name: str) -> None:
        self._config = folder / f"{name}.json"
        self._config.write_text(config(gateway).model_dump_json(by_alias=True, exclude_none=True))
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.health = f"127.0.0.1:{free_port()}"

    def start(self, namespace: str, *, quick: bool = False) -> None:
        command = [*SPILLWAY, "operator", "--config", str(self._config), "--namespace", namespace]
        command += ["--health-listen", self.health]
        if quick:
            command = [sys.executable, "-c", QUICK, str(self._config), namespace]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=dict(os.environ), stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def leads(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        return "leading" in self.log

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def ended(self, timeout_s: float = 60.0) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """kill -9; no error where it has ended already."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
