"""The few calls to a gateway that the operator makes. Each has a deadline: a gateway that is frozen holds up nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import datetime

from spillway.api.batch.v1 import batch_pb2
from spillway.api.client.batch import BatchClient, Order
from spillway.api.client.errors import RefusedError, UnreachableError
from spillway.api.client.target import Target, TargetError
from spillway.api.resources import BatchJob
from spillway.api.resources.batch_job import LineCountsStatus, State
from spillway.operator.desired.batch_jobs import INPUT_MISSING, GatewayJob, Trouble
from spillway.operator.errors import GatewayError
from spillway.operator.names import NAME_LABEL, NAMESPACE_LABEL, UID_LABEL

CALL_S, SUBMIT_S = 5.0, 30.0
FETCH_S = 1800.0
"""For an input that the gateway fetches itself: 64 GiB at 40 MB/s."""
_SKEW_S = 3600.0
"""By how much the clocks of API server and gateway may differ."""
_FOR_GOOD = {"INVALID_ARGUMENT", "INPUT_TOO_LARGE"}
"""Reasons for which asking again would be in vain. Quotas are none: other jobs end."""
_STATES: dict[int, State] = {
    batch_pb2.Job.VALIDATING: "Validating",
    batch_pb2.Job.RUNNING: "Running",
    batch_pb2.Job.PAUSED: "Paused",
    batch_pb2.Job.FINALIZING: "Finalizing",
    batch_pb2.Job.COMPLETED: "Completed",
    batch_pb2.Job.CANCELLED: "Cancelled",
    batch_pb2.Job.EXPIRED: "Expired",
    batch_pb2.Job.FAILED: "Failed",
}


class TroubleError(GatewayError):
    """The gateway could not be asked, or said no. `trouble` tells people, in the same words each time."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble


class Gateway:
    """The batch service, asked in the operator's name. Methods raise TroubleError."""

    def __init__(self, target: Target) -> None:
        """Raises TargetError."""
        self._address = target.address
        self._client = BatchClient(target, patience_s=0.0)

    async def __aenter__(self) -> Gateway:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.__aexit__()

    async def get(self, name: str) -> GatewayJob | None:
        """The job, None if there is no such job any more."""
        try:
            async with self._troubles(CALL_S):
                return _seen(await self._client.get(name))
        except _GoneError:
            return None

    async def find(self, uid: str, created: str) -> GatewayJob | None:
        """The job of the BatchJob with this UID, made at `created` (RFC 3339), None if there is none.

        Jobs come newest first: those from before the BatchJob need no look.
        """
        oldest_s = datetime.fromisoformat(created).timestamp() - _SKEW_S
        async with self._troubles(SUBMIT_S):
            async for job in self._client.jobs():
                if job.labels.get(UID_LABEL) == uid:
                    return _seen(job)
                if job.create_time.ToMicroseconds() / 1e6 < oldest_s:
                    break
        return None

    async def submit(self, batch_job: BatchJob, source: bytes | str) -> GatewayJob:
        """The job of this BatchJob: made, or the one that an earlier call made. `source`: its lines, or their URI."""
        spec, metadata = batch_job.spec, batch_job.metadata
        labels = {UID_LABEL: metadata.uid, NAMESPACE_LABEL: metadata.namespace, NAME_LABEL: metadata.name}
        job = batch_pb2.Job(model=spec.model, display_name=metadata.name[:200], labels=labels, priority=spec.priority)
        if spec.deadline is not None:
            job.deadline.FromDatetime(datetime.fromisoformat(spec.deadline))
        async with self._troubles(FETCH_S if isinstance(source, str) else SUBMIT_S, is_submit=True):
            return _seen(await self._client.submit(job, source, request_id=metadata.uid))

    async def order(self, name: str, order: Order) -> None:
        """Cancel, pause or resume. Nothing where the job has ended meanwhile, or is gone."""
        with contextlib.suppress(_GoneError):
            async with self._troubles(CALL_S):
                await self._client.order(name, order)

    @contextlib.asynccontextmanager
    async def _troubles(self, limit_s: float, *, is_submit: bool = False) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(limit_s):
                yield
        except RefusedError as error:
            if error.reason in ("JOB_NOT_FOUND", "JOB_FINAL"):
                raise _GoneError from error
            raise TroubleError(refused(error, is_submit=is_submit)) from error
        except (UnreachableError, TimeoutError) as error:
            message = f"the gateway at {self._address} does not answer; it is asked again"
            raise TroubleError(Trouble("GatewayReady", "NoAnswer", message)) from error
        except TargetError as error:
            raise TroubleError(Trouble("GatewayReady", "NoToken", str(error))) from error


class _GoneError(Exception):
    """There is no such job, or it is over."""


def refused(error: RefusedError, *, is_submit: bool) -> Trouble:
    """What people are told of a refusal: of the job where it was to be taken in, else of the gateway."""
    if error.reason == "INPUT_NOT_FOUND":
        return Trouble("Submitted", INPUT_MISSING, "the gateway finds no file at input.uri")
    reason = "".join(word.capitalize() for word in error.reason.split("_")) or "Refused"
    is_about_job = is_submit and error.reason != "UNAUTHENTICATED"
    return Trouble(
        "Submitted" if is_about_job else "GatewayReady",
        reason,
        f"the gateway refuses: {error}",
        is_final=is_submit and error.reason in _FOR_GOOD,
    )


def _seen(job: batch_pb2.Job) -> GatewayJob:
    counts = LineCountsStatus(
        total=job.lines.total,
        completed=job.lines.completed,
        failed=job.lines.failed,
        pending=job.lines.pending,
        leased=job.lines.leased,
        failed_by_code=dict(sorted(job.lines.failed_by_code.items())),
    )
    end_s = job.end_time.ToMicroseconds() / 1e6 if job.HasField("end_time") else None
    return GatewayJob(job.name, _STATES[job.state], counts, job.error.message or job.waiting_reason, end_s)
