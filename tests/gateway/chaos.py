"""Gateway processes and worker processes, killed and started again at random from a seed, with files torn in between.

By hand, for the long run: python tests/gateway/chaos.py --lines 20000 --seed 1 --gateways 3 --report FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from batch_files import answer, requests

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.api.client.batch import rows_of
from spillway.gateway.job import Job
from spillway.gateway.options import JobOptions
from spillway.gateway.paths import JobPaths
from spillway.gateway.service.claim import Owner
from spillway.gateway.service.state import State

HERE = Path(__file__).parent
REST_S = 0.2


@dataclass(frozen=True)
class Plan:
    """What to run and how to disturb it. `tears`: whether the log is cut while the (only) gateway is dead."""

    lines: int
    seed: int
    workers: int = 3
    gateways: int = 1
    """Over one data directory."""
    most_lines: int = 20
    pause_s: float = 0.2
    """The most that a worker rests between leases."""
    tears: bool = False
    between_kills_s: tuple[float, float] = (0.4, 1.2)
    calm_after_kills: int = 1000
    """From then on nothing is disturbed, so that it ends."""


@dataclass
class Report:
    """What happened, and what came of it."""

    gateway_kills: int = 0
    owners: int = 0
    """How many gateways have had the jobs, one after the other."""
    worker_kills: int = 0
    torn_bytes: int = 0
    seconds: float = 0.0
    state: str = ""
    rows_streamed: Counter[int] = field(default_factory=Counter)
    """How often a row of each line was read from the stream."""
    streamed: dict[int, bytes] = field(default_factory=dict)
    output: bytes = b""
    errors: bytes = b""
    repairs: list[str] = field(default_factory=list)


class Ground:
    """Processes and files of one run."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder, self.dice = plan, folder, random.Random(plan.seed)
        self.ports = [free_port() for _ in range(plan.gateways)]
        self.target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.report, self.done, self.accepted = Report(), threading.Event(), threading.Event()
        self.name = ""
        self.gateways = [self.start_gateway(port) for port in self.ports]
        self.workers = [self.start_worker() for _ in range(plan.workers)]

    def start_gateway(self, port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, HERE / "service_clients.py", self.folder / "data", str(port)])

    def start_worker(self) -> subprocess.Popen[bytes]:
        arguments = [self.target, str(self.dice.randrange(10**6))]
        arguments += [str(self.plan.most_lines), str(self.plan.pause_s)]
        return subprocess.Popen([sys.executable, HERE / "null_worker.py", *arguments])

    def disturb(self) -> None:
        """Kills somebody at random, and starts it again at once or a while later."""
        dice = self.dice
        if dice.random() < 0.6:
            number = dice.randrange(len(self.workers))
            self.workers[number].kill()
            self.workers[number].wait()
            self.workers[number] = self.start_worker()
            self.report.worker_kills += 1
            return
        owner = Owner.read(self.folder / "data")
        number = dice.randrange(len(self.gateways))
        if owner is not None and dice.random() < 0.6:
            number = self.ports.index(int(owner.grpc.rpartition(":")[2]))
        if dice.random() < 0.7:  # else it may be killed while it starts
            self.until_it_listens(number)
            time.sleep(dice.uniform(0, 0.5))
        self.gateways[number].kill()
        self.gateways[number].wait()
        self.report.gateway_kills += 1
        if self.plan.tears and dice.random() < 0.7:
            self.tear()
        time.sleep(dice.choice([0.0, 0.5]))
        self.gateways[number] = self.start_gateway(self.ports[number])

    def until_it_listens(self, number: int) -> None:
        while self.gateways[number].poll() is None and not self.done.is_set():
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.ports[number])) == 0:
                    return
            time.sleep(0.02)

    def tear(self) -> None:
        """What a power cut leaves: the end of the log is gone, or is there and was never written."""
        for log in (self.folder / "data" / "jobs").glob("*/output.jsonl.spillway/results.log"):
            size, cut = log.stat().st_size, self.dice.randint(1, 5000)
            with log.open("r+b") as file:
                file.truncate(max(0, size - cut))
                if self.dice.random() < 0.3:
                    file.truncate(size)
            self.report.torn_bytes += min(size, cut)

    def stop(self) -> None:
        for process in (*self.gateways, *self.workers):
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def insist(call: Any) -> Any:
    """What the call answers, however long the gateway is away."""
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            time.sleep(0.1)


def read_rows(stub: Any, name: str, cursor: str, report: Report) -> str:
    """Reads what there is after the cursor; the cursor to come back with, also when the gateway dies under way."""
    try:
        for message in stub.StreamResults(batch_pb2.StreamResultsRequest(name=name, cursor=cursor), timeout=30):
            for row in rows_of(message):
                report.rows_streamed[row.index] += 1
                report.streamed[row.index] = row.json
            cursor = message.cursor
    except grpc.RpcError:
        time.sleep(0.1)
    return cursor


def follow(ground: Ground, content: bytes) -> None:
    """Submits, reads results with a cursor over all interruptions until the job has ended, and fetches the files."""
    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
    with grpc.insecure_channel(ground.target, options) as channel:
        stub: Any = batch_pb2_grpc.BatchServiceStub(channel)

        def messages() -> Any:
            yield batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"), request_id="once")
            for start in range(0, len(content), 100_000):
                yield batch_pb2.SubmitJobRequest(input=content[start : start + 100_000])

        name = insist(lambda: stub.SubmitJob(messages(), timeout=30)).name
        cursor = ""
        ground.accepted.set()
        while True:
            job = insist(lambda: stub.GetJob(batch_pb2.GetJobRequest(name=name), timeout=5))
            cursor = read_rows(stub, name, cursor, ground.report)
            ground.report.repairs += [each for each in job.repairs if each not in ground.report.repairs]
            if job.state >= batch_pb2.Job.COMPLETED:
                break
            time.sleep(REST_S)
        ground.done.set()
        ground.report.state = batch_pb2.Job.State.Name(job.state)
        while (following := read_rows(stub, name, cursor, ground.report)) != cursor:
            cursor = following
        for file in (batch_pb2.ReadFileRequest.OUTPUT, batch_pb2.ReadFileRequest.ERRORS):
            request = batch_pb2.ReadFileRequest(name=name, file=file)
            fetched = insist(lambda request=request: [each.data for each in stub.ReadFile(request, timeout=60)])
            target = "output" if file == batch_pb2.ReadFileRequest.OUTPUT else "errors"
            setattr(ground.report, target, b"".join(fetched))


def run(plan: Plan, folder: Path) -> Report:
    """The whole run. Raises whatever went wrong for good."""
    ground = Ground(plan, folder)
    problems: list[BaseException] = []

    def following() -> None:
        try:
            follow(ground, input_of(plan))
        except BaseException as error:  # noqa: BLE001 — raised again in the caller's thread
            problems.append(error)
            ground.accepted.set()
            ground.done.set()

    started_s = time.monotonic()
    reader = threading.Thread(target=following)
    try:
        reader.start()
        ground.accepted.wait(120)
        while not ground.done.wait(ground.dice.uniform(*plan.between_kills_s)):
            if ground.report.gateway_kills + ground.report.worker_kills < plan.calm_after_kills:
                ground.disturb()
        reader.join()
    finally:
        ground.stop()
    if problems:
        raise problems[0]
    ground.report.seconds = time.monotonic() - started_s
    owner = Owner.read(folder / "data")
    assert owner is not None
    ground.report.owners = owner.generation
    return ground.report


def input_of(plan: Plan) -> bytes:
    """Lines that share documents, and bad ones among them."""
    return b"\n".join([*requests(plan.lines), b"{", b'{"custom_id":"r0"}', requests(1)[0]])


def quiet_run(plan: Plan, folder: Path) -> tuple[bytes, bytes]:
    """Output and errors of the same job in one process, disturbed by nobody; times of the job taken out."""
    paths = JobPaths(folder / "input.jsonl", folder / "output.jsonl", folder / "errors.jsonl")
    paths.input.write_bytes(input_of(plan))
    with Job.open(paths, JobOptions(model="m", dtype="as deployed")) as job:
        for line in job.pending():
            job.complete(line.index, answer(line))
        job.seal()
    return without_time(paths.output.read_bytes()), paths.errors.read_bytes()


def without_time(output: bytes) -> bytes:
    """The output of one job without when it began."""
    created = {part.split(b",")[0] for part in output.split(b'"created":')[1:]}
    assert len(created) == 1, "results of one job begin at one time"
    return output.replace(b'"created":' + created.pop(), b"")


def check(plan: Plan, report: Report, quiet: tuple[bytes, bytes]) -> None:
    """Every line has exactly one result, that of the quiet run; readers saw each, and once unless files were torn."""
    assert report.state == State.COMPLETED.name
    assert (without_time(report.output), report.errors) == quiet
    rows = report.output.splitlines(keepends=True)
    assert len({json.loads(row)["custom_id"] for row in rows}) == len(rows) == plan.lines
    assert all(row in report.output or row in report.errors for row in set(report.streamed.values()))
    if not plan.tears:
        assert sorted(report.rows_streamed) == list(range(plan.lines + 3))
        assert set(report.rows_streamed.values()) == {1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("--lines", 20_000),
        ("--seed", 1),
        ("--workers", 3),
        ("--most-lines", 40),
        ("--gateways", 1),
    ):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--tears", action="store_true")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left behind
    told = vars(arguments)
    plan = Plan(**{field.name: told[field.name] for field in dataclasses.fields(Plan) if field.name in told})
    with tempfile.TemporaryDirectory() as folder:
        for name in ("quiet", "chaos"):
            (Path(folder) / name).mkdir()
        quiet = quiet_run(plan, Path(folder) / "quiet")
        report = run(plan, Path(folder) / "chaos")
    check(plan, report, quiet)
    counts = dataclasses.asdict(report)
    for large in ("rows_streamed", "streamed", "output", "errors"):
        del counts[large]
    found = {
        "plan": dataclasses.asdict(plan),
        "report": counts,
        "lines_with_exactly_one_result": plan.lines + 3,
        "rows_streamed_twice": sum(count > 1 for count in report.rows_streamed.values()),
        "equal_to_quiet_run": True,
    }
    print(json.dumps(found, indent=1))
    if arguments.report:
        known = json.loads(arguments.report.read_text()) if arguments.report.exists() else []
        arguments.report.write_text(json.dumps([*known, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
