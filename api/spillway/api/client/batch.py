"""The batch service for programs: calls are repeated while the gateway is away, streams go on where they broke."""

from __future__ import annotations

import asyncio
import io
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import grpc

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.api.client.errors import TRANSIENT, ClientError, UnreachableError, refusal, retry_after_s
from spillway.api.client.target import Target
from spillway.api.tracing import SpanContext

CALL_S = 20.0
PIECE_BYTES = 1 << 20
FIRST_WAIT_S, MAX_WAIT_S = 0.1, 5.0
Answer = TypeVar("Answer")


class Order(Enum):
    """What can be asked of a job. All are idempotent."""

    CANCEL = "CancelJob"
    PAUSE = "PauseJob"
    RESUME = "ResumeJob"


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One row of an output or error file, newline included. `index` counts request lines of the input from 0."""

    index: int
    is_error: bool
    json: bytes


def rows_of(message: batch_pb2.StreamResultsResponse) -> list[ResultRow]:
    """The rows of a message, one by one."""
    errors = set(message.errors)
    rows = zip(message.indices, message.rows.split(b"\n"), strict=False)  # nothing follows the last newline
    return [ResultRow(index, place in errors, row + b"\n") for place, (index, row) in enumerate(rows)]


class BatchClient:
    """One gateway, one event loop. All methods raise RefusedError, and UnreachableError after `patience_s` of failing.

    Jobs are named "jobs/{job}". A stream's patience begins anew with each message.
    """

    def __init__(self, target: Target, patience_s: float = 60.0) -> None:
        """Raises TargetError."""
        self._target, self._patience_s = target, patience_s
        self._channel = target.channel()
        self._stub: Any = batch_pb2_grpc.BatchServiceStub(self._channel)

    async def __aenter__(self) -> BatchClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def submit(
        self, job: batch_pb2.Job, source: Path | str | bytes, request_id: str = "", traceparent: str = ""
    ) -> batch_pb2.Job:
        """Uploads request lines, or a file of them, or has the gateway fetch it if `source` is a string, a URI.

        Repeated under one request_id, so that there is one job however often. `traceparent` (W3C trace context) is the
        span that the job's trace is to hang on. Raises ClientError if the file cannot be read.
        """
        request_id = request_id or str(uuid.uuid4())
        caller = (("traceparent", traceparent),) if SpanContext.parse(traceparent) is not None else ()
        return await self._repeated(
            lambda: self._stub.SubmitJob(_upload(job, request_id, source), metadata=(*self._target.metadata(), *caller))
        )

    async def get(self, name: str) -> batch_pb2.Job:
        """The job now."""
        answer: batch_pb2.Job = await self._unary("GetJob", batch_pb2.GetJobRequest(name=name))
        return answer

    async def jobs(self) -> AsyncIterator[batch_pb2.Job]:
        """All jobs of the caller's tenant, newest first; pages are fetched as they are needed."""
        token = ""
        while True:
            page = await self._unary("ListJobs", batch_pb2.ListJobsRequest(page_token=token))
            for job in page.jobs:
                yield job
            token = page.next_page_token
            if not token:
                return

    async def watch(self, name: str) -> AsyncIterator[batch_pb2.Job]:
        """The job now and after every change, until it is final."""
        async for message in self._resumed("WatchJob", lambda: batch_pb2.WatchJobRequest(name=name)):
            yield message.job

    async def results(
        self, name: str, cursor: str = "", *, follow: bool = False
    ) -> AsyncIterator[batch_pb2.StreamResultsResponse]:
        """Rows in the order in which lines finished, after `cursor`; each message has the cursor to come back with.

        Rows can be written out as they are; `rows_of` takes them apart.
        """

        def request() -> batch_pb2.StreamResultsRequest:
            return batch_pb2.StreamResultsRequest(name=name, cursor=cursor, follow=follow)

        async for message in self._resumed("StreamResults", request):
            cursor = message.cursor
            yield message

    async def download(
        self, name: str, file: batch_pb2.ReadFileRequest.File.ValueType, offset_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        """The sealed output or error file of a job in a final state, in input order, from an offset on."""
        position = offset_bytes

        def request() -> batch_pb2.ReadFileRequest:
            return batch_pb2.ReadFileRequest(name=name, file=file, offset_bytes=position)

        async for message in self._resumed("ReadFile", request):
            position += len(message.data)
            yield message.data

    async def order(self, name: str, order: Order) -> batch_pb2.Job:
        """Cancel, pause or resume."""
        request = getattr(batch_pb2, f"{order.value}Request")(name=name)
        answer: batch_pb2.Job = await self._unary(order.value, request)
        return answer

    async def delete(self, name: str) -> None:
        """Removes a job in a final state with its files."""
        await self._unary("DeleteJob", batch_pb2.DeleteJobRequest(name=name))

    async def _unary(self, method: str, request: Any) -> Any:
        return await self._repeated(
            lambda: getattr(self._stub, method)(request, timeout=CALL_S, metadata=self._target.metadata())
        )

    async def _repeated(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        patience = _Patience(self._patience_s)
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                await patience.spend(error)

    async def _resumed(self, method: str, request: Callable[[], Any]) -> AsyncIterator[Any]:
        """A stream begun anew after each break, with what `request` then says."""
        patience = _Patience(self._patience_s)
        while True:
            call = getattr(self._stub, method)(request(), metadata=self._target.metadata())
            try:
                async for message in call:
                    patience = _Patience(self._patience_s)
                    yield message
            except grpc.aio.AioRpcError as error:
                await patience.spend(error)
            else:
                return
            finally:
                call.cancel()


class _Patience:
    """How long to go on trying, with waits that double, and jitter."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds
        self._wait_s = FIRST_WAIT_S

    async def spend(self, error: grpc.aio.AioRpcError) -> None:
        """Waits a while; raises what the error means if it is for good or there is no time left."""
        asked_s = retry_after_s(error)
        if error.code() not in TRANSIENT and asked_s is None:
            raise refusal(error) from error
        if asked_s is not None and time.monotonic() + asked_s > self._end_s:
            raise refusal(error) from error
        if asked_s is not None:
            await asyncio.sleep(asked_s * random.uniform(1.0, 1.2))  # noqa: S311 — jitter
            return
        if time.monotonic() + self._wait_s > self._end_s:
            what = f"the gateway cannot be used: {error.code().name}: {error.details() or ''}"
            raise UnreachableError(what, "Check its address, TLS and that it runs.") from error
        await asyncio.sleep(self._wait_s * random.uniform(0.5, 1.0))  # noqa: S311 — jitter
        self._wait_s = min(2 * self._wait_s, MAX_WAIT_S)


def _upload(job: batch_pb2.Job, request_id: str, source: Path | str | bytes) -> Iterator[batch_pb2.SubmitJobRequest]:
    """Opened here and not when the first piece is asked for: gRPC would hide the error."""
    if isinstance(source, str):
        return iter([batch_pb2.SubmitJobRequest(job=job, request_id=request_id, input_uri=source)])
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
    else:
        try:
            file = source.open("rb")
        except OSError as error:
            raise ClientError(f"{source} cannot be read: {error.strerror}") from error

    def pieces() -> Iterator[batch_pb2.SubmitJobRequest]:
        with file:
            yield batch_pb2.SubmitJobRequest(job=job, request_id=request_id)
            while piece := file.read(PIECE_BYTES):
                yield batch_pb2.SubmitJobRequest(input=piece)

    return pieces()
