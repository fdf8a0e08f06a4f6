#!/usr/bin/env python3
"""How fast results leave the gateway, beside what the same machine can do at best with the same bytes.

    python benchmarks/service/stream.py [--mib 256] [--row-bytes 400 4000] [--rounds 5] [--report FILE]

Two ceilings, measured in the same rounds: the file read with plain reads, and gRPC handing on one ready message of the
same size without any work, from a process of its own to the same client; for HTTP, a bare `sendfile` to the same
reader. The files are in the page cache throughout: the disk is not what is measured. Gateway, ceilings and readers
share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.results import machine

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.api.client.batch import BatchClient
from spillway.api.client.target import Target
from spillway.api.results import Usage
from spillway.gateway.job import Job
from spillway.gateway.service.batch_servicer import PAGE_BYTES
from spillway.gateway.service.claim import Claim
from spillway.gateway.service.spec import End, JobRequest, JobSpec, Outcome
from spillway.gateway.service.store import JobFolder, JobStore

MIB = 1 << 20
LINES_AT_ONCE = 1000
LISTENING = "listening on "


@dataclass
class Figures:
    """Of one size of rows; an entry a round. Rates in MiB/s; seconds of CPU are those of server and reader for a GiB.

    `share` is what is reached of the ceiling: by the medians of the rates, and by the least CPU. The latter holds on a
    machine with company, too.
    """

    row_bytes: int
    rows: int
    output_bytes: int
    rates: dict[str, list[float]] = field(default_factory=dict)
    server_cpu_s_per_gib: dict[str, list[float]] = field(default_factory=dict)
    reader_cpu_s_per_gib: dict[str, list[float]] = field(default_factory=dict)
    server_grew_mib: dict[str, float] = field(default_factory=dict)
    """Memory of its own at most, against before."""
    share: dict[str, dict[str, float]] = field(default_factory=dict)


def make_job(data: Path, total_bytes: int, row_bytes: int) -> tuple[str, JobFolder]:
    """A job that has ended, with so many bytes of output; its name and folder."""
    claim = Claim(data)
    store = JobStore(data)
    upload = store.upload(1 << 40)
    frame = 220  # what stands around a body in a row, about
    body = b'{"text":"%b","usage":{"prompt_tokens":1,"completion_tokens":1}}' % (b"x" * (row_bytes - frame))
    for number in range(total_bytes // row_bytes):
        upload.write(
            b'{"custom_id":"r%d","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":"%d"}}\n'
            % (number, number)
        )
    upload.finish()
    asked = JobRequest("m")
    spec = JobSpec(upload.id, asked, upload.sha256, upload.size_bytes, upload.num_lines, time.time())
    folder = store.adopt(upload, spec)
    with Job.open(folder.paths, asked.options()) as job:
        indices = list(job.pending_indices())
        for start in range(0, len(indices), LINES_AT_ONCE):
            job.complete_all([(index, body, Usage(1, 1)) for index in indices[start : start + LINES_AT_ONCE]])
        job.seal(keep_log=True)
    msgspec.structs.replace(spec, outcome=Outcome(End.COMPLETED, time.time())).save(folder.spec)
    claim.release()
    return f"jobs/{spec.id}", folder


class Process:
    """A Python program that says on its first lines where it listens."""

    def __init__(self, *command: str, lines: int = 1) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.ports = [int(self.process.stdout.readline().rpartition(":")[2]) for _ in range(lines)]
        self.proc = Path(f"/proc/{self.process.pid}")

    def anonymous_mib(self) -> float:
        """Memory of its own, now."""
        return int((self.proc / "status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    def cpu_s(self) -> float:
        """Used so far."""
        user, system = (self.proc / "stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(*command: str, lines: int = 1) -> Iterator[Process]:
    started = Process(*command, lines=lines)
    try:
        yield started
    finally:
        started.process.terminate()
        started.process.wait(60)
        assert started.process.stdout is not None
        started.process.stdout.close()


# what the ceilings are made of


class ReadyMessages(batch_pb2_grpc.BatchServiceServicer):
    """Answers StreamResults with one ready message as often as the name asked for says."""

    def __init__(self, row_bytes: int) -> None:
        row = b"x" * (row_bytes - 1) + b"\n"
        rows = PAGE_BYTES // (row_bytes + 32)
        indices = range(500_000, 500_000 + rows)
        self._message = batch_pb2.StreamResultsResponse(rows=row * rows, cursor="ffffffff-0123", indices=indices)

    async def StreamResults(self, request: Any, context: Any) -> AsyncIterator[batch_pb2.StreamResultsResponse]:  # noqa: N802, ARG002 - the proto's
        for _ in range(int(request.name)):
            yield self._message


async def serve_ready_messages(row_bytes: int) -> None:
    server = grpc.aio.server()
    batch_pb2_grpc.add_BatchServiceServicer_to_server(ReadyMessages(row_bytes), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"{LISTENING}:{port}", flush=True)
    await server.wait_for_termination()


def serve_file(path: Path) -> None:
    """The file to whoever connects, by sendfile, behind the least header that there is."""
    with socket.create_server(("127.0.0.1", 0)) as server, path.open("rb") as file:
        print(f"{LISTENING}:{server.getsockname()[1]}", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % path.stat().st_size)
                connection.sendfile(file, 0)


# what is measured: each returns how many bytes of rows it got


def read_file(path: Path) -> int:
    size = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(MIB):
            size += len(piece)
    return size


def cpu_here_s() -> float:
    """Of this process and of the commands that it ran."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def cat(path: Path) -> int:
    subprocess.run(["cat", path], check=True, stdout=subprocess.DEVNULL)
    return path.stat().st_size


async def stream(port: int, name: str) -> int:
    async with BatchClient(Target(f"127.0.0.1:{port}")) as client:
        return sum([len(message.rows) async for message in client.results(name)])


async def download(port: int, name: str) -> int:
    async with BatchClient(Target(f"127.0.0.1:{port}")) as client:
        return sum([len(data) async for data in client.download(name, batch_pb2.ReadFileRequest.OUTPUT)])


def fetch(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", path)
    answer, size, piece = connection.getresponse(), 0, memoryview(bytearray(MIB))
    while got := answer.readinto(piece):
        size += got
    connection.close()
    return size


def command(port: int, name: str) -> int:
    """`spillway results` into a file, Python's own start included."""
    with tempfile.TemporaryFile() as out:
        call = [sys.executable, "-m", "spillway.cli.main", "results", name, "--gateway", f"127.0.0.1:{port}"]
        subprocess.run(call, stdout=out, check=True)
        return out.tell()


def measure(folder: Path, row_bytes: int, options: argparse.Namespace) -> Figures:
    """All ways, one after the other, round by round."""
    data = folder / f"data-{row_bytes}"
    name, job = make_job(data, options.mib * MIB, row_bytes)
    output, log = job.paths.output, job.paths.directory / "results.log"
    size = output.stat().st_size
    figures = Figures(row_bytes, options.mib * MIB // row_bytes, size)
    http_path = f"/v1/files/file-{name.removeprefix('jobs/')}-output/content"
    serve = ("-m", "spillway.cli.main", "serve", "--jobs-dir", str(data))
    here = str(Path(__file__))
    with (
        running(*serve, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", lines=2) as gateway,
        running(here, "--serve-messages", str(row_bytes)) as messages,
        running(here, "--serve-file", str(output)) as bare,
    ):
        port, http_port = gateway.ports
        count = str(max(1, size // PAGE_BYTES))
        ways: dict[str, tuple[Process, Callable[[], int]]] = {
            "read of the log": (gateway, lambda: read_file(log)),
            "cat of the output": (gateway, lambda: cat(output)),
            "gRPC, ready messages": (messages, lambda: asyncio.run(stream(messages.ports[0], count))),
            "StreamResults": (gateway, lambda: asyncio.run(stream(port, name))),
            "spillway results": (gateway, lambda: command(port, name)),
            "ReadFile": (gateway, lambda: asyncio.run(download(port, name))),
            "HTTP, bare sendfile": (bare, lambda: fetch(bare.ports[0], "/")),
            "HTTP, file content": (gateway, lambda: fetch(http_port, http_path)),
        }
        for _ in range(options.rounds):
            for way, (server, run) in ways.items():
                note(figures, way, run, server)
    rates = {way: median(each) for way, each in figures.rates.items()}
    both = (figures.server_cpu_s_per_gib, figures.reader_cpu_s_per_gib)
    cpu_s = {way: sum(min(part[way]) for part in both) for way in rates}
    for way, ceiling in (
        ("StreamResults", "gRPC, ready messages"),
        ("ReadFile", "gRPC, ready messages"),
        ("HTTP, file content", "HTTP, bare sendfile"),
    ):
        shares = {"rate": rates[way] / rates[ceiling], "cpu": cpu_s[ceiling] / cpu_s[way]}
        figures.share[f"{way} of {ceiling}"] = shares
    return figures


def note(figures: Figures, way: str, run: Callable[[], int], server: Process) -> None:
    """One run of one way."""
    before_mib, server_s, reader_s = server.anonymous_mib(), server.cpu_s(), cpu_here_s()
    most_mib, over = before_mib, threading.Event()

    def sample() -> None:
        nonlocal most_mib
        while not over.wait(0.05):
            most_mib = max(most_mib, server.anonymous_mib())

    sampling = threading.Thread(target=sample)
    sampling.start()
    started_s = time.perf_counter()
    got = run()
    seconds = time.perf_counter() - started_s
    over.set()
    sampling.join()
    gib = got / MIB / 1024
    figures.rates.setdefault(way, []).append(got / MIB / seconds)
    figures.server_cpu_s_per_gib.setdefault(way, []).append((server.cpu_s() - server_s) / gib)
    figures.reader_cpu_s_per_gib.setdefault(way, []).append((cpu_here_s() - reader_s) / gib)
    figures.server_grew_mib[way] = max(figures.server_grew_mib.get(way, 0.0), most_mib - before_mib)
    if way == "StreamResults":
        assert got == figures.output_bytes, "the stream is not the whole output"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="Of output, for each size of rows.")
    parser.add_argument("--row-bytes", type=int, nargs="+", default=[400, 4000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--directory", type=Path, help="Where the data lies. Default: a temporary one.")
    parser.add_argument("--serve-messages", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_messages:
        asyncio.run(serve_ready_messages(options.serve_messages))
    if options.serve_file:
        serve_file(options.serve_file)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        figures = [asdict(measure(Path(folder), row_bytes, options)) for row_bytes in options.row_bytes]
    found = {"machine": machine(), "page_bytes": PAGE_BYTES, "load_average_before": load, "figures": figures}
    text = json.dumps(found, indent=1)
    print(text)
    if options.report is not None:
        options.report.write_text(text + "\n")


if __name__ == "__main__":
    main()
