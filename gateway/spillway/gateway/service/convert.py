"""Between what the wire says and what the service knows."""

from __future__ import annotations

import math
import re
import time

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from spillway.api.batch.v1 import batch_pb2
from spillway.api.worker.v1 import worker_pb2
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    Reason,
    ResourceError,
    ServiceError,
    UnauthenticatedError,
)
from spillway.gateway.service.fleet import AgentStatus, TierStatus
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.spec import MAX_TIME_S, JobRequest
from spillway.gateway.service.state import State

MAX_TIERS = 8
ERROR_DOMAIN = "spillway.dev"
_NAME = re.compile(r"jobs/([0-9a-f]{1,64})")
_CODES = {
    InvalidError: code_pb2.INVALID_ARGUMENT,
    NotFoundError: code_pb2.NOT_FOUND,
    ConflictError: code_pb2.FAILED_PRECONDITION,
    AlreadyExistsError: code_pb2.ALREADY_EXISTS,
    ResourceError: code_pb2.UNAVAILABLE,
    DamagedError: code_pb2.DATA_LOSS,
    UnauthenticatedError: code_pb2.UNAUTHENTICATED,
    ForbiddenError: code_pb2.PERMISSION_DENIED,
}
_EXHAUSTED = {
    Reason.INPUT_TOO_LARGE,
    Reason.QUOTA_JOBS,
    Reason.QUOTA_LINES,
    Reason.QUOTA_BYTES,
    Reason.RATE_LIMITED,
}
_STATES = {state: batch_pb2.Job.State.Value(state.name) for state in State}


def job_id(name: str) -> str:
    """The id in "jobs/{job}". Raises InvalidError."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidError('name must have the form "jobs/{job}"')
    return match[1]


def job_request(job: batch_pb2.Job, request_id: str) -> JobRequest:
    """The client's part of a job; output-only fields are ignored. Raises InvalidError."""
    try:
        deadline_s = job.deadline.ToMicroseconds() / 1e6 if job.HasField("deadline") else None
    except ValueError as error:
        raise InvalidError(f"deadline is no time: {error}") from None
    return JobRequest(job.model, job.display_name, dict(job.labels), job.priority, deadline_s, request_id)


def job_message(job: ServedJob, coordinator: Coordinator) -> batch_pb2.Job:
    """The whole resource."""
    spec, request, counts, tokens = job.spec, job.spec.request, job.counts(), job.tokens()
    now_s = time.monotonic()
    message = batch_pb2.Job(
        name=f"jobs/{spec.id}",
        display_name=request.display_name,
        model=request.model,
        labels=request.labels,
        priority=request.priority,
        state=_STATES[job.state],
        lines=batch_pb2.LineCounts(
            total=counts.total,
            completed=counts.completed,
            failed=counts.failed,
            pending=counts.pending,
            leased=job.num_leased,
            failed_by_code=counts.errors_by_code,
        ),
        waiting_reason=coordinator.waiting_reason(job),
        create_time=_timestamp(spec.created_s),
        input_sha256=spec.input_sha256,
        input_bytes=spec.input_bytes,
        tokens=batch_pb2.TokenCounts(
            prompt=tokens.prompt_tokens, completion=tokens.completion_tokens, per_second=job.tokens_per_s(now_s)
        ),
        repairs=job.repairs,
    )
    band_s = job.end_band_s(now_s)
    if band_s is not None:
        message.earliest_end_time.CopyFrom(_timestamp(min(time.time() + band_s[0], MAX_TIME_S)))
        message.latest_end_time.CopyFrom(_timestamp(min(time.time() + band_s[1], MAX_TIME_S)))
    if request.deadline_s is not None:
        message.deadline.CopyFrom(_timestamp(request.deadline_s))
    if spec.outcome is not None:
        message.end_time.CopyFrom(_timestamp(spec.outcome.end_s))
        if spec.outcome.message:
            message.error.CopyFrom(status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=spec.outcome.message))
    return message


def agent_status(request: worker_pb2.LeaseRequest | worker_pb2.RenewRequest) -> AgentStatus | None:
    """What an agent tells of itself beside a call; None if nothing. Names beyond the first `MAX_TIERS` are left out."""
    if not request.HasField("status"):
        return None
    told = request.status
    return AgentStatus(
        told.pool_blocks,
        told.pool_used_blocks,
        told.pool_cached_blocks,
        told.prompt_tokens,
        told.reused_tokens,
        told.generated_tokens,
        {
            tier.name[:32]: TierStatus(tier.bytes, tier.budget_bytes, tier.hits, tier.misses)
            for tier in told.tiers[:MAX_TIERS]
        },
    )


def code(error: ServiceError) -> code_pb2.Code:
    """The canonical code of a refusal."""
    if error.reason in _EXHAUSTED:
        return code_pb2.RESOURCE_EXHAUSTED
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def status(error: ServiceError) -> grpc.Status:
    """What a refusal looks like on the wire: code, message, reason, and the hint for people."""
    message = status_pb2.Status(code=code(error), message=str(error))
    message.details.add().Pack(error_details_pb2.ErrorInfo(reason=str(error.reason), domain=ERROR_DOMAIN))
    if isinstance(error, ResourceError) and error.retry_s is not None:
        wait = error_details_pb2.RetryInfo()
        wait.retry_delay.FromMilliseconds(math.ceil(error.retry_s * 1000))
        message.details.add().Pack(wait)
    return rpc_status.to_status(message)


def defect() -> grpc.Status:
    """Of a call that a defect ended. It has details, too: by them a gateway in between knows that a gateway said it."""
    message = status_pb2.Status(code=code_pb2.INTERNAL, message="a defect of the gateway; its log says more")
    return rpc_status.to_status(message)


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp
