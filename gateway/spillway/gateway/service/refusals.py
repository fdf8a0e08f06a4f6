"""Turns what a call raises into a status on the wire: refusals with their reason, defects without their insides."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2

from spillway.gateway.service.access import Access, Caller, Kind
from spillway.gateway.service.convert import code, defect, status
from spillway.gateway.service.errors import InvalidError, ServiceError

log = logging.getLogger(__name__)
_OURS = "/spillway."
_KINDS = {"spillway.batch.v1.BatchService": Kind.CLIENT, "spillway.worker.v1.WorkerService": Kind.AGENT}
_caller: ContextVar[Caller] = ContextVar("caller")  # set for each call before it reaches its servicer
_traceparent: ContextVar[str] = ContextVar("traceparent", default="")


def tenant() -> str:
    """The tenant of the call that is being answered."""
    return _caller.get().tenant


def traceparent() -> str:
    """What the call that is being answered says of its trace (W3C trace context); empty if it says nothing."""
    return _traceparent.get()


class Observer(Protocol):
    """Is told of every call of our services once it is over. `code` is that of the status, `OK` included."""

    def answered(self, method: str, code: str, seconds: float) -> None:
        """A call with one answer. `method` is its name without that of its service."""

    def streamed(self, method: str, code: str) -> None:
        """A call with a stream of answers; how long it took is a matter of how long the client wanted to listen."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is asked before each call, and who is told after it."""

    access: Access
    admit: Callable[[str], None]
    """Is told the tenant of each client's call; raises ServiceError if it was one too many."""
    observer: Observer | None = None


class RefusalInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every call of our services: lets in whom `access` knows, for what its kind of caller may do."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC before each call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        entry = _Entry(self._watch, method, metadata, bool(handler.response_streaming))
        codec = _forgiving(handler.request_deserializer), handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_answering(handler.unary_unary, entry), *codec)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(_answering(handler.stream_unary, entry), *codec)
        return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream, entry), *codec)


@dataclass(frozen=True, slots=True)
class _Entry:
    watch: Watch
    method: str
    metadata: Mapping[str, str | bytes]
    streams: bool

    def check(self) -> None:
        """Raises UnauthenticatedError, ForbiddenError, ResourceError."""
        caller = self.watch.access.caller(self._text("authorization"))
        kind = _KINDS[self.method.split("/")[1]]
        caller.need(kind)
        if kind is Kind.CLIENT:
            self.watch.admit(caller.tenant)
        _caller.set(caller)
        _traceparent.set(self._text("traceparent") or "")

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def over(self, code: str, began_s: float) -> None:
        """Tells the observer."""
        method, observer = self.method.rpartition("/")[2], self.watch.observer
        if observer is not None and self.streams:
            observer.streamed(method, code)
        elif observer is not None:
            observer.answered(method, code, time.monotonic() - began_s)


class _Undecodable:
    """Stands for a message that could not be decoded: gRPC itself would blame the server for it."""


def _forgiving(deserialize: Any) -> Any:
    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Undecodable()

    return decode


def _decoded(message: Any) -> Any:
    if isinstance(message, _Undecodable):
        raise InvalidError("the message cannot be decoded")
    return message


async def _decoded_each(messages: AsyncIterable[Any]) -> AsyncIterator[Any]:
    async for message in messages:
        yield _decoded(message)


def _answering(call: Any, entry: _Entry) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        async with _refusing(context, entry):
            streamed = isinstance(request, AsyncIterable)
            return await call(_decoded_each(request) if streamed else _decoded(request), context)

    return answer


def _streaming(call: Any, entry: _Entry) -> Any:
    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        async with _refusing(context, entry), contextlib.aclosing(call(_decoded(request), context)) as answers:
            async for answer in answers:
                yield answer

    return stream


@contextlib.asynccontextmanager
async def _refusing(context: Any, entry: _Entry) -> AsyncIterator[None]:
    began_s, ended = time.monotonic(), "CANCELLED"  # unless it comes to an end of its own
    try:
        entry.check()
        yield
        ended = "OK"
    except ServiceError as error:
        ended = code_pb2.Code.Name(code(error))
        await context.abort_with_status(status(error))
    except Exception:  # a defect: logged whole, told without its inside
        ended = "INTERNAL"
        log.exception("%s failed by a defect of the gateway", entry.method)
        await context.abort_with_status(defect())
    finally:
        entry.over(ended, began_s)
