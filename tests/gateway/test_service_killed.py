"""A gateway that is killed again and again, with workers that lose leases: every line has one result, the right one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
from pathlib import Path

import grpc
from batch_files import requests
from service_clients import Client, State, connected

from spillway.api.worker.v1 import worker_pb2

NUM_LINES = 1500
SERVER = Path(__file__).with_name("service_clients.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def work(client: Client, dice: random.Random, stop: asyncio.Event) -> None:
    """A worker that sometimes vanishes with its lines, returns them, fails them, or says everything twice."""
    while not stop.is_set():
        with contextlib.suppress(grpc.aio.AioRpcError):  # the gateway is dead just now; what we hold is leased again
            leased = await client.lease(dice.randint(1, 30), wait_s=1)
            if not leased.lines:
                continue
            fate = dice.random()
            if fate < 0.05:
                continue
            if fate < 0.1:
                await client.worker.Return(worker_pb2.ReturnRequest(leases=[leased.lease]))
                continue
            await client.complete(leased)
            if fate < 0.2:
                await client.complete(leased)
        await asyncio.sleep(0.05)


async def killing(data: Path, port: int, dice: random.Random, done: asyncio.Event) -> int:
    """Starts a gateway, kills it, and so on until the job is done; returns the number of kills."""
    kills = 0
    while True:
        server = await asyncio.create_subprocess_exec(sys.executable, SERVER, data, str(port))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), dice.uniform(1.2, 2.5) if kills < 8 else None)
        server.kill()
        await server.wait()
        if done.is_set():
            return kills
        kills += 1


async def follow(client: Client, name: str, done: asyncio.Event) -> list[worker_pb2.LeasedLine]:
    """Reads results with a cursor over all interruptions, until the job is final."""
    rows, cursor = [], ""
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            more, cursor = await client.rows(name, cursor)
            rows += more
            if not more and (await client.get(name)).state >= State.COMPLETED:
                more, cursor = await client.rows(name, cursor)
                done.set()
                return rows + more
        await asyncio.sleep(0.1)


async def submit(client: Client, content: bytes) -> str:
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            return str((await client.submit(content, request_id="once", piece=10_000)).name)
        await asyncio.sleep(0.1)


def test_exactly_one_result_per_line(tmp_path: Path) -> None:
    async def run() -> None:
        dice, port = random.Random(7), free_port()
        done = asyncio.Event()
        killer = asyncio.create_task(killing(tmp_path, port, dice, done))
        async with connected(port) as client:
            name = await submit(client, b"\n".join([*requests(NUM_LINES), b"{"]))
            workers = [asyncio.create_task(work(client, dice, done)) for _ in range(3)]
            rows = await follow(client, name, done)
            kills = await killer
            await asyncio.gather(*workers)
        assert kills >= 2
        assert sorted(row.index for row in rows) == list(range(NUM_LINES + 1))
        output = (tmp_path / name / "output.jsonl").read_bytes()
        assert b"".join(row.json for row in sorted(rows, key=lambda row: row.index) if not row.error) == output
        assert all(b'"answer to r%d"' % number in row for number, row in enumerate(output.splitlines()))

    asyncio.run(asyncio.wait_for(run(), 240))
