"""spillway.worker.v1 from the agent's side: each call with its deadline and token, over a channel that heals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from spillway.api.client.target import Target, TargetError
from spillway.api.errors import LineError
from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc
from spillway.node_agent.agent.desk import LeasedLine, Outcome
from spillway.node_agent.lines import LineAnswer

CALL_S = 10.0
"""Deadline of a call that waits for nothing."""
_FINAL = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}


class CallError(Exception):
    """A call came to nothing. `final`: another attempt would fare the same."""

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True, slots=True)
class Leased:
    """Lines of one lease, and for how many seconds they are ours. `traceparent` is the gateway's span of it, if any."""

    ttl_s: float
    lines: list[LeasedLine]
    traceparent: str = ""


class Wire:
    """Calls of one agent. After each, `trouble` says why the gateway cannot be used, or is empty."""

    def __init__(
        self, target: Target, worker: str, model: str, status: Callable[[], worker_pb2.AgentStatus | None]
    ) -> None:
        """`status` is told to the gateway now and then. Raises TargetError if token or TLS files cannot be read."""
        target.metadata()
        self._target, self.worker, self.model, self._status = target, worker, model, status
        self._channel = target.channel()
        self._closing: set[asyncio.Task[None]] = set()
        self.calls = self.failed_calls = 0
        self.trouble = "the gateway has not been reached yet"

    async def lease(self, most: int, wait_s: float) -> Leased:
        """Up to `most` lines; none after `wait_s`. Raises CallError."""
        wait = Duration()
        wait.FromMilliseconds(round(wait_s * 1000))
        request = worker_pb2.LeaseRequest(
            worker=self.worker, model=self.model, max_lines=most, wait=wait, status=self._status()
        )
        response = await self._call("Lease", request, wait_s + CALL_S)
        lines = [
            LeasedLine(
                response.lease,
                each.job,
                each.index,
                each.request,
                each.response_id,
                each.created,
                each.line_number,
            )
            for each in response.lines
        ]
        return Leased(response.ttl.ToMilliseconds() / 1000, lines, response.traceparent)

    async def renew(self, leases: Sequence[str]) -> list[str]:
        """Keeps leases; returns those that are lost. Raises CallError."""
        request = worker_pb2.RenewRequest(leases=leases, worker=self.worker, model=self.model, status=self._status())
        response = await self._call("Renew", request, CALL_S)
        return list(response.lost_leases)

    async def report(self, outcomes: Sequence[Outcome], traceparent: str = "") -> None:
        """Completes and fails lines of one lease. Repeating it does no harm. Raises CallError.

        `traceparent`: our span of it, if there is one.
        """
        job, lease = outcomes[0].line.job, outcomes[0].line.lease
        results = [
            worker_pb2.CompleteRequest.Result(index=each.line.index, body=each.result.body)
            for each in outcomes
            if isinstance(each.result, LineAnswer)
        ]
        failures = [
            worker_pb2.FailRequest.Failure(
                index=each.line.index,
                code=each.result.code,
                message=each.result.message,
                param=each.result.param or "",
                retryable=each.retryable,
            )
            for each in outcomes
            if isinstance(each.result, LineError)
        ]
        if results:
            complete = worker_pb2.CompleteRequest(job=job, lease=lease, results=results)
            await self._call("Complete", complete, 3 * CALL_S, traceparent)
        if failures:
            await self._call("Fail", worker_pb2.FailRequest(job=job, lease=lease, failures=failures), CALL_S)

    async def give_back(self, leases: Sequence[str]) -> None:
        """Returns what is unfinished under these leases. Raises CallError."""
        await self._call("Return", worker_pb2.ReturnRequest(leases=leases), CALL_S)

    async def close(self) -> None:
        """Ends the connection."""
        for task in self._closing:
            task.cancel()
        await self._channel.close()

    async def _call(self, method: str, request: Any, deadline_s: float, traceparent: str = "") -> Any:
        self.calls += 1
        try:
            stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
            metadata = self._target.metadata()
            if traceparent:
                metadata = (*metadata, ("traceparent", traceparent))
            response = await getattr(stub, method)(request, timeout=deadline_s, metadata=metadata)
        except TargetError as error:
            self._failed(error.message)
            raise CallError(self.trouble, final=False) from error
        except grpc.aio.AioRpcError as error:
            final = error.code() in _FINAL
            if final:  # the gateway is there, and has an opinion
                self.trouble = ""
            else:
                self._failed(f"{method}: {error.code().name}: {error.details() or ''}"[:300])
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._reconnect()
            raise CallError(f"{method}: {error.code().name}: {error.details() or ''}"[:300], final=final) from error
        self.trouble = ""
        return response

    def _failed(self, message: str) -> None:
        self.failed_calls += 1
        self.trouble = message

    def _reconnect(self) -> None:
        """A silent peer may be a cut cable: TCP would notice after a quarter of an hour."""
        task = asyncio.create_task(self._channel.close(CALL_S), name="spillway-old-channel")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self._channel = self._target.channel()
