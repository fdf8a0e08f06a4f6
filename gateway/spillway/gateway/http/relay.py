"""Calls over HTTP to a gateway that does not have the jobs: passed on to the one that has, bodies in pieces."""

from __future__ import annotations

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from spillway.gateway.http.reading import BROKEN
from spillway.gateway.service.errors import InvalidError, Reason, ResourceError
from spillway.gateway.service.link import Link
from spillway.gateway.service.relay import MARK

_OF_THIS_HOP = {
    "connection",
    "expect",  # answered here
    "host",
    "keep-alive",
    "origin",  # looked at here
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    MARK,
}


def relayed(request: web.Request) -> bool:
    """Whether another gateway passed it on to this one."""
    return MARK in request.headers


async def relay(request: web.Request, link: Link) -> web.StreamResponse:
    """What the owner answers. From which page the call comes has been looked at; who calls, the owner decides.

    Raises ResourceError if the owner cannot be asked, InvalidError; ConnectionError if either side goes away under way.
    """
    if not request.raw_path.startswith("/"):  # else it could name another host
        raise InvalidError("the target of a request begins with a slash")
    if not link.owner.http:
        message = f"the gateway at {link.owner.grpc}, which has the jobs, serves no HTTP"
        raise ResourceError(Reason.HANDOVER, message, "Start all gateways with --http, or none.")
    scheme = "http" if link.trust.tls is None else "https"
    headers = _passed_on(request.headers)
    headers.update({MARK: "1", "Host": "localhost"})  # the owner's own check of names is not for calls through us
    try:
        answer = await link.session.request(
            request.method,
            URL(f"{scheme}://{link.owner.http}{request.raw_path}", encoded=True),
            headers=headers,
            data=request.content if request.body_exists else None,
            allow_redirects=False,
            server_hostname=link.trust.name if link.trust.tls is not None else None,
        )
    except (aiohttp.ClientError, TimeoutError) as error:
        raise link.refusal() from error
    async with answer:
        return await _pass_back(request, answer)


async def _pass_back(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    passed = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_passed_on(answer.headers))
    await passed.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await passed.write(piece)
    except BROKEN as error:
        if request.transport is not None:
            request.transport.abort()  # so that nobody takes what came for all of it
        raise ConnectionResetError("the answer broke off") from error
    await passed.write_eof()
    return passed


def _passed_on(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for value in headers.getall("Connection", ()) for name in value.split(",")}
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _OF_THIS_HOP | named)
