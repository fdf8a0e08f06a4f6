"""What is raised becomes an error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math

from aiohttp import web
from google.rpc import code_pb2

from spillway.gateway.service.convert import code
from spillway.gateway.service.errors import InvalidError, Reason, ResourceError, ServiceError

_STATUSES = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.FAILED_PRECONDITION: 409,
    code_pb2.NOT_FOUND: 404,
    code_pb2.ALREADY_EXISTS: 409,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.DATA_LOSS: 500,
}
_REASON_STATUSES = {Reason.INPUT_TOO_LARGE: 413, Reason.RANGE_NOT_SATISFIABLE: 416, Reason.TIMEOUT: 408}
_REASON_CODES = {Reason.UNAUTHENTICATED: "invalid_api_key"}
_ROUTING_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large", 417: "expectation_failed"}


class FieldError(InvalidError):
    """One field of a request is wrong; `param` says which (empty: the body as a whole)."""

    def __init__(self, param: str, message: str, reason: Reason = Reason.INVALID_ARGUMENT) -> None:
        super().__init__(message, reason=reason)
        self.param = param


def refusal(error: ServiceError) -> web.Response:
    """The answer to a call that the service refuses. `code` is its reason in lower case."""
    status = _REASON_STATUSES.get(error.reason) or _STATUSES[code(error)]
    param = error.param or None if isinstance(error, FieldError) else None
    answer = error_response(status, _REASON_CODES.get(error.reason, error.reason.lower()), str(error), param)
    if status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, ResourceError) and error.retry_s is not None:
        answer.headers["Retry-After"] = str(math.ceil(error.retry_s))
    return answer


def routing_refusal(error: web.HTTPException, path: str) -> web.Response:
    """The answer where the framework refuses: no such address, no such method, too large a body."""
    message = {404: f"there is no {path[:200]}", 405: f"{path[:200]} does not take this method"}
    answer = error_response(
        error.status, _ROUTING_CODES.get(error.status, "invalid_request"), message.get(error.status, error.reason)
    )
    if "Allow" in error.headers:
        answer.headers["Allow"] = error.headers["Allow"]
    return answer


def defect() -> web.Response:
    """The answer to a call that hit a defect of ours."""
    return error_response(500, "internal_error", "a defect of the gateway; its log says more")


def error_response(status: int, reason: str, message: str, param: str | None = None) -> web.Response:
    """One error."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": reason}
    return web.json_response({"error": error}, status=status)
