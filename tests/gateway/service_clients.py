"""A gateway in this process with a client and a worker, for the tests of the service."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.api.client.batch import rows_of
from spillway.api.lines import BatchLine, parse_line
from spillway.api.results import BodyHead, Choice, Usage, completion_body
from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc
from spillway.gateway.service.claim import Claim
from spillway.gateway.service.coordinator import Coordinator, ServiceConfig
from spillway.gateway.service.leases import LeaseRules
from spillway.gateway.service.server import gateway

State = batch_pb2.Job.State


def body_of(line: worker_pb2.LeasedLine) -> bytes:
    """What a real engine would answer: a body that follows from the request alone."""
    parsed = parse_line(line.request, line.line_number)
    assert isinstance(parsed, BatchLine)
    head = BodyHead(line.response_id, line.created, parsed.body.model)
    return completion_body(head, [Choice(0, f"answer to {parsed.custom_id}", "stop")], Usage(1, 1))


@dataclass
class Client:
    """Both services over one channel."""

    channel: grpc.aio.Channel
    port: int = 0

    def __post_init__(self) -> None:
        self.batch: Any = batch_pb2_grpc.BatchServiceStub(self.channel)
        self.worker: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)

    async def submit(self, content: bytes, *, request_id: str = "", piece: int = 1000, **job: Any) -> batch_pb2.Job:
        def messages() -> Iterator[batch_pb2.SubmitJobRequest]:
            yield batch_pb2.SubmitJobRequest(job=batch_pb2.Job(**({"model": "m"} | job)), request_id=request_id)
            for start in range(0, len(content), piece):
                yield batch_pb2.SubmitJobRequest(input=content[start : start + piece])

        return await self.batch.SubmitJob(messages())

    async def get(self, name: str) -> batch_pb2.Job:
        return await self.batch.GetJob(batch_pb2.GetJobRequest(name=name))

    async def until(self, name: str, *states: int) -> batch_pb2.Job:
        """Watches until the job is in one of the states, or final."""
        async for message in self.batch.WatchJob(batch_pb2.WatchJobRequest(name=name)):
            if message.job.state in states:
                return message.job
        return await self.get(name)

    async def until_leased(self, name: str, count: int) -> None:
        """Polls until so many lines of a job are with workers."""
        while (await self.get(name)).lines.leased != count:
            await asyncio.sleep(0.05)

    async def lease(self, count: int, *, wait_s: int = 20, model: str = "m") -> worker_pb2.LeaseResponse:
        wait = {"seconds": wait_s}
        return await self.worker.Lease(worker_pb2.LeaseRequest(worker="w", model=model, max_lines=count, wait=wait))

    async def complete(self, leased: worker_pb2.LeaseResponse) -> worker_pb2.CompleteResponse:
        results = [worker_pb2.CompleteRequest.Result(index=line.index, body=body_of(line)) for line in leased.lines]
        job = leased.lines[0].job
        return await self.worker.Complete(worker_pb2.CompleteRequest(job=job, lease=leased.lease, results=results))

    async def work(self, count: int = 4) -> int:
        """Leases and completes until there is nothing left."""
        done = 0
        while (leased := await self.lease(count, wait_s=0)).lines:
            done += (await self.complete(leased)).accepted
        return done

    async def rows(self, name: str, cursor: str = "", *, follow: bool = False) -> tuple[list[Any], str]:
        request = batch_pb2.StreamResultsRequest(name=name, cursor=cursor, follow=follow)
        rows: list[Any] = []
        async for message in self.batch.StreamResults(request):
            rows += rows_of(message)
            cursor = message.cursor
        return rows, cursor

    async def file(self, name: str, file: int = batch_pb2.ReadFileRequest.OUTPUT, offset: int = 0) -> bytes:
        request = batch_pb2.ReadFileRequest(name=name, file=file, offset_bytes=offset)
        return b"".join([message.data async for message in self.batch.ReadFile(request)])


@contextlib.asynccontextmanager
async def serving(data: Path, *, rules: LeaseRules | None = None, **config: Any) -> AsyncIterator[Client]:
    """A gateway on a free port, and a client of it."""
    settings = ServiceConfig(data, leases=rules or LeaseRules(), **config)
    async with gateway(settings, "127.0.0.1:0") as served, connected(served.port) as client:
        yield client


@contextlib.asynccontextmanager
async def coordinating(data: Path, **config: Any) -> AsyncIterator[Coordinator]:
    """A gateway without its wire."""
    claim = Claim(data)
    coordinator = Coordinator(ServiceConfig(data, **config), claim)
    await coordinator.start()
    try:
        yield coordinator
    finally:
        await coordinator.stop()
        claim.release()


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Client(channel, port)


class Refusal:
    """What a refused call said: filled in when `refused` ends."""

    code: grpc.StatusCode
    reason: str
    message: str

    def take(self, error: grpc.aio.AioRpcError) -> None:
        status = rpc_status.from_call(error)
        assert status is not None, error
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert info.domain == "spillway.dev"
        self.code, self.reason, self.message = error.code(), info.reason, status.message


@contextlib.contextmanager
def refused() -> Iterator[Refusal]:
    """Expects the call inside to be refused, with a coded reason."""
    refusal = Refusal()
    try:
        yield refusal
    except grpc.aio.AioRpcError as error:
        refusal.take(error)
    else:
        raise AssertionError("the call was not refused")


async def serve(data: Path, port: int) -> None:
    """A gateway alone, until it is killed."""
    async with gateway(ServiceConfig(data, leases=LeaseRules(ttl_s=2, max_attempts=1000)), f"127.0.0.1:{port}"):
        await asyncio.Event().wait()


if __name__ == "__main__":  # a process of its own, for tests that kill it
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
