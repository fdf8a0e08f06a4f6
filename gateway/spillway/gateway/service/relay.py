"""Calls over gRPC to a gateway that does not have the jobs: passed on to the one that has, as they are.

Messages are bytes here, both ways; metadata, deadline, cancellation, status and its details go along. The owner decides
who the caller is and what it may do. A call is never repeated: the owner may have acted on what it got.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from spillway.gateway.service.convert import status
from spillway.gateway.service.errors import ServiceError
from spillway.gateway.service.link import Link
from spillway.gateway.service.ownership import Ownership

MARK = "spillway-relayed"
"""Carried by a call that was passed on, as metadata or header."""
SETTLE_S = 0.05
_PREFIX = "/spillway."
_OF_THIS_HOP = {"user-agent", "content-type", "te", MARK}
_DETAILS = "grpc-status-details-bin"
_OF_THE_WAY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}
"""What gRPC itself makes of a connection that ends in the middle of a call."""


class RelayInterceptor(grpc.aio.ServerInterceptor):
    """Comes before everything else that looks at calls of our services."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC before each call."""
        method = handler_call_details.method
        if not method.startswith(_PREFIX):
            return await continuation(handler_call_details)
        relayed = any(key == MARK for key, _ in handler_call_details.invocation_metadata or ())
        try:
            way = await self._ownership.way(relayed=relayed)
        except ServiceError as error:
            return grpc.stream_stream_rpc_method_handler(_refusing(error))
        if isinstance(way, Link):
            return grpc.stream_stream_rpc_method_handler(_relaying(way, method))
        return await continuation(handler_call_details)


def _refusing(error: ServiceError) -> Any:
    async def refuse(_requests: Any, context: Any) -> None:
        await context.abort_with_status(status(error))

    return refuse


def _relaying(link: Link, method: str) -> Any:
    async def relay(requests: AsyncIterator[bytes], context: Any) -> None:
        passing: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = link.channel.stream_stream(method)
        metadata = _passed_on(context.invocation_metadata())
        call = passing(_whole(requests), timeout=context.time_remaining(), metadata=metadata)
        try:
            async for message in call:
                await context.write(message)
            context.set_trailing_metadata(tuple(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            trailing = tuple(error.trailing_metadata() or ())
            broke = error.code() in _OF_THE_WAY and _DETAILS not in dict(trailing)  # nobody said so
            if broke:
                await context.abort_with_status(status(link.refusal()))
            await context.abort(error.code(), error.details() or "", trailing)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # by the caller
            await context.abort_with_status(status(link.refusal()))  # the link was closed: the owner is gone
        finally:
            call.cancel()

    return relay


async def _whole(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The caller's messages. A caller that is gone looks at first like one that has sent everything.

    Its cancellation follows at once, and ends the call: before it, the owner must not be told that this was all.
    """
    count = 0
    async for request in requests:
        yield request
        count += 1
    if count > 1:
        await asyncio.sleep(SETTLE_S)


def _passed_on(metadata: Any) -> tuple[tuple[str, str | bytes], ...]:
    kept = [(key, value) for key, value in metadata if key not in _OF_THIS_HOP and not key.startswith("grpc-")]
    return (*kept, (MARK, "1"))
