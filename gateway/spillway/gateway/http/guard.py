"""What every HTTP call passes on its way in and out: who calls, from which page, what came of it, how long it took."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from spillway.gateway.http.metrics import GatewayMetrics
from spillway.gateway.http.reading import CALLER
from spillway.gateway.http.refusals import defect, refusal, routing_refusal
from spillway.gateway.http.relay import relay, relayed
from spillway.gateway.service.access import Access, Kind
from spillway.gateway.service.errors import ForbiddenError, ServiceError
from spillway.gateway.service.link import Link
from spillway.gateway.service.ownership import Ownership

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_KINDS = {"v1": (Kind.CLIENT,), "api": (Kind.CLIENT, Kind.MONITOR), "metrics": (Kind.MONITOR,)}
"""Who may call what, by the first part of the route. The page itself, which holds no data, is anybody's."""
_OF_JOBS = frozenset({"v1", "api"})
"""What only the gateway that has the jobs can answer: another passes it on, and that one asks who calls."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})


class Guard:
    """The door's one middleware."""

    def __init__(self, access: Access, ownership: Ownership, metrics: GatewayMetrics) -> None:
        self._access, self._ownership, self._metrics = access, ownership, metrics

    @web.middleware
    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets the call through or refuses it; whatever is raised becomes a coded error."""
        began_s = time.monotonic()
        resource = request.match_info.route.resource
        route = "none" if resource is None else resource.canonical  # not the path, which has many spellings
        answer = await self._answer(request, handler, route)
        answer.headers.update(_HEADERS)
        method = request.method if request.method in _METHODS else "other"
        self._metrics.http_answered(route, method, answer.status, time.monotonic() - began_s)
        return answer

    async def _answer(self, request: web.Request, handler: Handler, route: str) -> web.StreamResponse:
        try:
            self._check_page(request)
            part = route.strip("/").split("/")[0]
            if part in _OF_JOBS:
                way = await self._ownership.way(relayed=relayed(request))
                if isinstance(way, Link):
                    return await relay(request, way)
            kinds = _KINDS.get(part)
            if kinds is not None:
                caller = self._access.caller(request.headers.get("Authorization"))
                caller.need(*kinds)
                request[CALLER] = caller
                if kinds == (Kind.CLIENT,):
                    self._ownership.admit(caller.tenant)
            return await handler(request)
        except ServiceError as error:
            return refusal(error)
        except web.HTTPException as error:
            return routing_refusal(error, request.path)
        except ConnectionError:
            raise  # nobody is there to be answered
        except Exception:  # a defect: logged whole, told without its inside
            log.exception("%s %s failed by a defect of the gateway", request.method, request.path[:200])
            return defect()

    def _check_page(self, request: web.Request) -> None:
        """Keeps pages of others, which a browser on this machine may show, from calling. Raises ForbiddenError.

        Such a page gives itself away by its Origin; or, if its own name was made to lead here, by the Host it asks for.
        The latter counts where no token is asked for, which is on loopback.
        """
        origin, host = request.headers.get("Origin"), request.headers.get("Host")  # browsers always send a Host
        if origin is not None and _host(origin) != (host or "").lower():
            raise ForbiddenError("calls from pages of other origins are not answered")
        if self._access.tokens is None and host is not None and _is_loopback(request) and not _is_local(host):
            raise ForbiddenError("ask for this machine by its address or as localhost")


def _host(url: str) -> str:
    """Host and port of a URL; empty if it has none, or is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def _is_loopback(request: web.Request) -> bool:
    name = request.get_extra_info("sockname")
    return bool(name) and ipaddress.ip_address(name[0].partition("%")[0]).is_loopback


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False
