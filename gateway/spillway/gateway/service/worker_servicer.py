"""spillway.worker.v1 over the jobs."""

from __future__ import annotations

import time
from typing import Any

from google.protobuf.duration_pb2 import Duration
from grpc.aio import ServicerContext

from spillway.api.errors import ErrorCode, LineError
from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc
from spillway.gateway.service.convert import agent_status, job_id
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.dispatch import Grant
from spillway.gateway.service.errors import InvalidError
from spillway.gateway.service.job_trace import Report
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.refusals import traceparent

MAX_WAIT_S = 60.0
Context = ServicerContext[Any, Any]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Refusals are raised as ServiceError; the server's interceptor makes statuses of them."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership
        self._ttl = Duration(nanos=0)
        self._ttl.FromMilliseconds(round(ownership.config.leases.ttl_s * 1000))

    @property
    def _coordinator(self) -> Coordinator:
        return self._ownership.coordinator

    async def Lease(self, request: worker_pb2.LeaseRequest, context: Context) -> worker_pb2.LeaseResponse:
        if not request.worker or not request.model:
            raise InvalidError("worker and model must be given")
        try:
            wait_s = request.wait.ToMilliseconds() / 1000
        except ValueError as error:
            raise InvalidError(f"wait is no length of time: {error}") from None
        if not 0 <= wait_s <= MAX_WAIT_S:
            raise InvalidError(f"wait must lie in [0 s, {MAX_WAIT_S:.0f} s]")
        self._coordinator.fleet.hear(request.worker, request.model, agent_status(request), time.monotonic())
        grant = await self._coordinator.lease(request.worker, request.model, request.max_lines, wait_s)
        return worker_pb2.LeaseResponse() if grant is None else self._response(grant)

    async def Renew(self, request: worker_pb2.RenewRequest, context: Context) -> worker_pb2.RenewResponse:
        if request.worker:  # agents of before said nothing of themselves
            self._coordinator.fleet.hear(request.worker, request.model, agent_status(request), time.monotonic())
        return worker_pb2.RenewResponse(lost_leases=self._coordinator.renew(list(request.leases)))

    async def Complete(self, request: worker_pb2.CompleteRequest, context: Context) -> worker_pb2.CompleteResponse:
        results = [(result.index, result.body) for result in request.results]
        report = Report(request.lease, traceparent())
        accepted = self._coordinator.complete(job_id(request.job), results, report)
        return worker_pb2.CompleteResponse(accepted=accepted, ignored=len(results) - accepted)

    async def Fail(self, request: worker_pb2.FailRequest, context: Context) -> worker_pb2.FailResponse:
        failures = [(failure.index, _line_error(failure), failure.retryable) for failure in request.failures]
        accepted = self._coordinator.fail(job_id(request.job), request.lease, failures)
        return worker_pb2.FailResponse(accepted=accepted, ignored=len(failures) - accepted)

    async def Return(self, request: worker_pb2.ReturnRequest, context: Context) -> worker_pb2.ReturnResponse:
        self._coordinator.give_back(list(request.leases))
        return worker_pb2.ReturnResponse()

    def _response(self, grant: Grant) -> worker_pb2.LeaseResponse:
        lines = [
            worker_pb2.LeasedLine(
                job=f"jobs/{grant.job_id}",
                index=line.index,
                request=line.raw,
                response_id=line.head.id,
                created=line.head.created,
                line_number=line.line_number,
                attempt=attempt,
            )
            for line, attempt in grant.lines
        ]
        return worker_pb2.LeaseResponse(
            lease=grant.lease.id, ttl=self._ttl, lines=lines, traceparent=grant.lease.traceparent
        )


def _line_error(failure: worker_pb2.FailRequest.Failure) -> LineError:
    try:
        code = ErrorCode(failure.code)
    except ValueError:
        raise InvalidError(f"{failure.code[:100]!r} is no code of the error file") from None
    return LineError(code, failure.message, 0, failure.param or None)
