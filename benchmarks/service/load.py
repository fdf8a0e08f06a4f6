#!/usr/bin/env python3
"""What the gateway bears: a large job submitted, watched, drained by engines that answer at once, and read back.

    python benchmarks/service/load.py [--lines 1000000] [--watchers 1000] [--report FILE]

Gateway, engines and watchers are processes of their own on this machine, over real sockets; the figures are the
gateway's with all of them on the same cores. A lease waits for nothing here, so its time is the gateway's alone plus
what the cores are busy with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.results import machine

from spillway.api.batch.v1 import batch_pb2
from spillway.api.client.batch import BatchClient
from spillway.api.client.target import Target

HERE = Path(__file__).parent
MIB = 1 << 20
WATCHERS_PER_CHANNEL = 100
DOCUMENTS = 2000


@dataclass
class Figures:
    """All that is reported. Times of calls are as the engines saw them."""

    lines: int
    input_bytes: int = 0
    upload_s: float = 0.0
    intake_s: float = 0.0
    drain_s: float = 0.0
    seal_s: float = 0.0
    lines_per_s: float = 0.0
    lease_lines: int = 0
    call_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    gateway_rss_mib: dict[str, float] = field(default_factory=dict)
    gateway_cpu_us_per_line: dict[str, float] = field(default_factory=dict)
    """Of all its threads; what others do on the machine does not count."""
    watchers: int = 0
    watch_messages: int = 0
    stream_mib_per_s: float = 0.0
    stream_rows: int = 0
    read_file_mib_per_s: float = 0.0
    disk_read_mib_per_s: float = 0.0
    load_average_before: float = 0.0


def write_input(path: Path, lines: int) -> int:
    """Lines of about 330 bytes that share beginnings, in no order. Returns the size."""
    chooser = np.random.default_rng(1)
    words = np.array(["left", "right", "up", "down", "north", "south"])
    texts = [" ".join(chooser.choice(words, 40)) for _ in range(DOCUMENTS)]
    of = chooser.integers(0, DOCUMENTS, lines)
    with path.open("w", buffering=MIB) as file:
        for number in range(lines):
            file.write(
                f'{{"custom_id":"r{number}","method":"POST","url":"/v1/completions","body":{{"model":"m",'
                f'"prompt":"{texts[of[number]]} {number}","max_tokens":8,"temperature":0}}}}\n'
            )
    return path.stat().st_size


class GatewayProcess:
    """`spillway serve`, and what it uses."""

    def __init__(self, data: Path) -> None:
        command = [sys.executable, "-m", "spillway.cli.main", "serve", "--jobs-dir", data, "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]
        self.proc = Path(f"/proc/{self.process.pid}")

    def rss_mib(self) -> float:
        """Resident now, file pages of the line table included."""
        return int((self.proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB

    def anonymous_mib(self) -> float:
        """Memory of its own: what is resident less the pages of files, which the kernel may drop."""
        return int((self.proc / "status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    def cpu_s(self) -> float:
        """Used so far."""
        user, system = (self.proc / "stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(data: Path) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(data)
    try:
        yield gateway
    finally:
        gateway.process.terminate()
        gateway.process.wait(60)


async def until(client: BatchClient, name: str, *states: int) -> batch_pb2.Job:
    """Watches until the job is in one of the states."""
    async for job in client.watch(name):
        if job.state in states:
            return job
    raise RuntimeError(f"{name} ended: {job}")


async def drain(gateway: GatewayProcess, engines: int, lease_lines: int, figures: Figures) -> None:
    """Runs engines until all lines are done; samples the gateway's memory meanwhile."""
    started_s = time.monotonic()
    command = [sys.executable, HERE / "null_engine.py", gateway.address, str(lease_lines)]
    processes = [await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE) for _ in range(engines)]
    answers = asyncio.gather(*(process.communicate() for process in processes))
    samples = [gateway.anonymous_mib()]
    while not answers.done():
        await asyncio.wait([answers], timeout=0.5)
        samples.append(gateway.anonymous_mib())
    found = [json.loads(out) for out, _ in await answers]
    assert sum(each["lines"] for each in found) == figures.lines
    figures.drain_s = max(each["done_s"] for each in found) - started_s  # starting the engines included
    for call in ("lease", "complete"):
        times_ms = 1000 * np.concatenate([each["times_s"][call] for each in found])
        shares = {"p50": 50, "p99": 99, "max": 100}
        figures.call_ms[call] = {name: float(np.percentile(times_ms, share)) for name, share in shares.items()}
        figures.call_ms[call]["calls"] = len(times_ms)
    figures.gateway_rss_mib |= {
        "anonymous at the beginning of the drain": samples[0],
        "anonymous at half": samples[len(samples) // 2],
        "anonymous at the end": samples[-1],
        "anonymous at most": max(samples),
    }


async def watch_all(address: str, name: str, watchers: int) -> int:
    """So many watchers at once, until the job has ended; how many messages they got. Each saw the end."""
    clients = [BatchClient(Target(address)) for _ in range(-(-watchers // WATCHERS_PER_CHANNEL))]
    messages = 0

    async def one(client: BatchClient) -> int:
        nonlocal messages
        state = 0
        async for job in client.watch(name):
            messages += 1
            state = job.state
        return state

    states = await asyncio.gather(*(one(clients[number % len(clients)]) for number in range(watchers)))
    assert set(states) <= {batch_pb2.Job.COMPLETED}
    for client in clients:
        await client.__aexit__()
    return messages


async def read_back(client: BatchClient, name: str, output: Path, figures: Figures) -> None:
    """The rows as a stream, the sealed file, and the same file from the disk."""
    started_s, size = time.perf_counter(), 0
    async for message in client.results(name):
        figures.stream_rows += len(message.indices)
        size += len(message.rows)
    figures.stream_mib_per_s = size / MIB / (time.perf_counter() - started_s)
    for attribute in ("read_file_mib_per_s", "disk_read_mib_per_s"):
        with output.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started_s, size = time.perf_counter(), 0
        if attribute == "disk_read_mib_per_s":
            with output.open("rb", buffering=0) as file:
                while piece := file.read(MIB):
                    size += len(piece)
        else:
            async for data in client.download(name, batch_pb2.ReadFileRequest.OUTPUT):
                size += len(data)
        assert size == output.stat().st_size
        setattr(figures, attribute, size / MIB / (time.perf_counter() - started_s))


async def measure(arguments: argparse.Namespace, folder: Path) -> Figures:
    """The whole run."""
    figures = Figures(arguments.lines, lease_lines=arguments.lease_lines, watchers=arguments.watchers)
    figures.load_average_before = os.getloadavg()[0]
    source = folder / "input.jsonl"
    figures.input_bytes = write_input(source, arguments.lines)
    with serving(folder / "data") as gateway:
        figures.gateway_rss_mib["resident before"] = gateway.rss_mib()
        used_s = {"start": gateway.cpu_s()}
        async with BatchClient(Target(gateway.address)) as client:
            started_s = time.perf_counter()
            job = await client.submit(batch_pb2.Job(model="m"), source)
            figures.upload_s = time.perf_counter() - started_s
            started_s = time.perf_counter()
            await until(client, job.name, batch_pb2.Job.RUNNING)
            figures.intake_s = time.perf_counter() - started_s
            used_s["intake"] = gateway.cpu_s()
            watching = asyncio.create_task(watch_all(gateway.address, job.name, arguments.watchers))
            await drain(gateway, arguments.engines, arguments.lease_lines, figures)
            used_s["drain"] = gateway.cpu_s()
            started_s = time.perf_counter()
            final = await until(client, job.name, batch_pb2.Job.COMPLETED)
            figures.seal_s = time.perf_counter() - started_s
            assert final.lines.completed == arguments.lines
            figures.watch_messages = await watching
            figures.lines_per_s = arguments.lines / figures.drain_s
            await read_back(client, job.name, folder / "data" / job.name / "output.jsonl", figures)
            figures.gateway_rss_mib["resident at the end"] = gateway.rss_mib()
            used_s["seal and read back"] = gateway.cpu_s()
            for (_, before_s), (what, after_s) in pairwise(used_s.items()):
                figures.gateway_cpu_us_per_line[what] = 1e6 * (after_s - before_s) / arguments.lines
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--lines", 1_000_000), ("--watchers", 0), ("--engines", 1), ("--lease-lines", 256)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--report", type=Path, help="Where the figures go, after those of earlier runs.")
    parser.add_argument("--directory", type=Path, help="Where the data lies. Default: a temporary one.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        figures: dict[str, Any] = asdict(asyncio.run(measure(arguments, Path(folder))))
    found = {"machine": machine(), **figures}
    print(json.dumps(found, indent=1))
    if report := arguments.report:
        known = json.loads(report.read_text()) if report.exists() else []
        report.write_text(json.dumps([*known, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
