"""spillway.batch.v1 over the jobs: reading requests, writing answers, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpc.aio import ServicerContext

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.gateway.service.convert import job_id, job_message, job_request
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.errors import ConflictError, InvalidError, NotFoundError, Reason
from spillway.gateway.service.limits import Usage
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.refusals import tenant, traceparent
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.spec import JobRequest, Wish
from spillway.gateway.service.state import State
from spillway.gateway.service.store import Upload

WATCH_INTERVAL_S = 0.25
MAX_WATCH_MESSAGES_PER_S = 500
"""With more watchers than this lets see every change, each sees changes less often."""
WATCH_IDLE_S = 10.0
FOLLOW_INTERVAL_S = 0.25
PAGE_BYTES = 1 << 20
DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 50, 1000

Context = ServicerContext[Any, Any]


class BatchServicer(batch_pb2_grpc.BatchServiceServicer):
    """Refusals are raised as ServiceError; the server's interceptor makes statuses of them."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership
        self._watchers = 0
        self._shown: dict[str, _Shown] = {}

    @property
    def _coordinator(self) -> Coordinator:
        return self._ownership.coordinator

    async def SubmitJob(
        self, request_iterator: AsyncIterable[batch_pb2.SubmitJobRequest], context: Context
    ) -> batch_pb2.Job:
        upload = self._coordinator.upload()

        async def admit(request: JobRequest) -> None:
            if self._coordinator.named(tenant(), request.request_id) is None:  # else it is a repetition, and adds none
                await self._coordinator.check_room(tenant(), upload, Usage(jobs=1), counts_lines=True)

        try:
            request, uri = await _receive(request_iterator, upload, admit)
            if uri:
                await self._coordinator.fetch(uri, upload)
            return self._message(await self._coordinator.submit(tenant(), request, upload, traceparent()))
        finally:
            upload.close()

    async def GetJob(self, request: batch_pb2.GetJobRequest, context: Context) -> batch_pb2.Job:
        return self._message(self._coordinator.get(job_id(request.name), tenant()))

    async def ListJobs(self, request: batch_pb2.ListJobsRequest, context: Context) -> batch_pb2.ListJobsResponse:
        if request.page_size < 0:
            raise InvalidError("page_size must not be negative")
        size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        jobs, following = self._coordinator.page(tenant(), size, request.page_token)
        return batch_pb2.ListJobsResponse(jobs=map(self._message, jobs), next_page_token=following)

    async def WatchJob(
        self, request: batch_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[batch_pb2.WatchJobResponse]:
        job = self._coordinator.get(job_id(request.name), tenant())
        self._watchers += 1
        try:
            while True:
                shown = self._show(job)
                yield shown.response
                if shown.state.final:
                    return
                await self._wait_for_change(job, shown.version)
                job = self._coordinator.get(job.spec.id)  # NOT_FOUND if it was deleted meanwhile
        finally:
            self._watchers -= 1

    async def StreamResults(
        self, request: batch_pb2.StreamResultsRequest, context: Context
    ) -> AsyncIterator[batch_pb2.StreamResultsResponse]:
        job = self._coordinator.get(job_id(request.name), tenant())
        cursor = request.cursor
        while True:
            changed, final = job.changed, job.state.final
            async with contextlib.aclosing(self._pages(job, cursor)) as pages:
                async for page in pages:
                    cursor = page.cursor
                    yield page
            if final or not request.follow:
                return
            with contextlib.suppress(TimeoutError):  # what is done is readable once it is durable: no change of the job
                await asyncio.wait_for(changed.wait(), FOLLOW_INTERVAL_S)
            job = self._coordinator.get(job.spec.id)

    async def ReadFile(
        self, request: batch_pb2.ReadFileRequest, context: Context
    ) -> AsyncIterator[batch_pb2.ReadFileResponse]:
        job = self._coordinator.get(job_id(request.name), tenant())
        if not job.state.final:
            raise ConflictError(Reason.JOB_NOT_FINAL, f"{request.name} is {job.state.name.lower()}", "Watch it first.")
        if request.file not in (batch_pb2.ReadFileRequest.OUTPUT, batch_pb2.ReadFileRequest.ERRORS):
            raise InvalidError("file must be OUTPUT or ERRORS")
        if request.offset_bytes < 0:
            raise InvalidError("offset_bytes must not be negative")
        paths = job.folder.paths
        path = job.whole_file(paths.output if request.file == batch_pb2.ReadFileRequest.OUTPUT else paths.errors)
        if path is None:
            raise NotFoundError(Reason.NO_ERRORS, f"{request.name} has no such file")
        with path.open("rb") as file:
            file.seek(request.offset_bytes)
            while data := await asyncio.to_thread(file.read, PAGE_BYTES):
                yield batch_pb2.ReadFileResponse(data=data)

    async def CancelJob(self, request: batch_pb2.CancelJobRequest, context: Context) -> batch_pb2.Job:
        return self._message(self._coordinator.wish(tenant(), job_id(request.name), Wish.CANCEL))

    async def PauseJob(self, request: batch_pb2.PauseJobRequest, context: Context) -> batch_pb2.Job:
        return self._message(self._coordinator.wish(tenant(), job_id(request.name), Wish.PAUSE))

    async def ResumeJob(self, request: batch_pb2.ResumeJobRequest, context: Context) -> batch_pb2.Job:
        return self._message(self._coordinator.wish(tenant(), job_id(request.name), Wish.RUN))

    async def DeleteJob(self, request: batch_pb2.DeleteJobRequest, context: Context) -> Empty:
        await self._coordinator.delete(tenant(), job_id(request.name))
        return Empty()

    def _message(self, job: ServedJob) -> batch_pb2.Job:
        return job_message(job, self._coordinator)

    def _show(self, job: ServedJob) -> _Shown:
        """What watchers of a job see now: one message for all of them, a moment old unless the state changed."""
        shown, now_s = self._shown.get(job.spec.id), time.monotonic()
        if shown is None or shown.state is not job.state or now_s - shown.made_s > WATCH_INTERVAL_S:
            response = batch_pb2.WatchJobResponse(job=self._message(job))
            shown = self._shown[job.spec.id] = _Shown(job.version, job.state, now_s, response)
            if shown.state.final:
                del self._shown[job.spec.id]
        return shown

    async def _wait_for_change(self, job: ServedJob, version: int) -> None:
        """Until there is something new to show; now and then also without: why a job waits may change by itself."""
        end_s = time.monotonic() + WATCH_IDLE_S
        while job.version == version and (left_s := end_s - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.changed.wait(), left_s)
        # Changes come in thousands; a watcher wants a few a second.
        await asyncio.sleep(max(WATCH_INTERVAL_S, self._watchers / MAX_WATCH_MESSAGES_PER_S))

    async def _pages(self, job: ServedJob, cursor: str) -> AsyncGenerator[batch_pb2.StreamResultsResponse, None]:
        """What there is after the cursor; a page is read while the one before it is sent."""
        reading = asyncio.ensure_future(self._rows(job, cursor))
        try:
            while (page := await reading) is not None and page.indices:
                reading = asyncio.ensure_future(self._rows(job, page.cursor))
                yield page
        finally:
            reading.cancel()

    async def _rows(self, job: ServedJob, cursor: str) -> batch_pb2.StreamResultsResponse | None:
        found = job.tail()
        if found is None:
            return None
        tail, end = found
        try:
            start = tail.position(cursor)
        except ValueError:
            raise InvalidError("cursor is not one of this job") from None
        page = await asyncio.to_thread(tail.read, start, end, PAGE_BYTES)
        return batch_pb2.StreamResultsResponse(
            rows=page.rows, cursor=tail.cursor(page.position), indices=page.indices, errors=page.errors
        )


@dataclass(frozen=True, slots=True)
class _Shown:
    version: int
    state: State
    made_s: float
    response: batch_pb2.WatchJobResponse


async def _receive(
    messages: AsyncIterable[batch_pb2.SubmitJobRequest], upload: Upload, admit: Callable[[JobRequest], Awaitable[None]]
) -> tuple[JobRequest, str]:
    """Writes the input; returns what the first message asks for, and where the input is if it was not sent.

    `admit` is told of the request before any of the input is taken in. Raises InvalidError before anything is stored.
    """
    request: JobRequest | None = None
    uri = ""
    async for message in messages:
        if request is None:
            if not message.HasField("job"):
                raise InvalidError("the first message must carry the job")
            request = job_request(message.job, message.request_id)
            request.check()
            await admit(request)
            uri = message.input_uri
        elif message.HasField("job") or message.request_id or message.input_uri:
            raise InvalidError("only the first message may carry job, request_id and input_uri")
        if uri and message.input:
            raise InvalidError("give the input or its URI, not both")
        upload.write(message.input)
    if request is None:
        raise InvalidError("no message was sent")
    return request, uri
