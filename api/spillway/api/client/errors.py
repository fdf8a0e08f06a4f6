"""What a call to a gateway can come to."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from spillway.api.errors import SpillwayError


class ClientError(SpillwayError):
    """Root of what the client raises."""


class UnreachableError(ClientError):
    """The gateway could not be used for as long as the caller had patience."""


class RefusedError(ClientError):
    """The gateway said no. `code` is gRPC's; `reason`, such as JOB_NOT_FOUND, is for programs and may be empty."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code, self.reason = code, reason


def retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """How long the gateway asks to wait before the call is repeated; None if it does not."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is asked of a Call
    asked = error_details_pb2.RetryInfo()
    for detail in [] if status is None else status.details:
        if detail.Unpack(asked):
            return float(asked.retry_delay.ToMilliseconds()) / 1000
    return None


TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


def refusal(error: grpc.aio.AioRpcError) -> RefusedError:
    """The refusal behind a status of the service."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is asked of a Call
    info = error_details_pb2.ErrorInfo()
    for detail in [] if status is None else status.details:
        detail.Unpack(info)
    message, _, hint = (error.details() or error.code().name.lower()).partition("\n")
    return RefusedError(error.code(), info.reason, message, hint)
