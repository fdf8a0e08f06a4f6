"""Requests read with care: query and JSON body, of which every field is checked."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

from spillway.gateway.http.refusals import FieldError
from spillway.gateway.http.shelf import PageQuery
from spillway.gateway.service.access import Caller
from spillway.gateway.service.errors import InvalidError, Reason, ResourceError

Body = TypeVar("Body")
BROKEN = (ClientError, HttpProcessingError, RequestPayloadError)
"""What reading a body raises if its sender goes away or breaks its own framing."""
STALL_S = 60.0
"""A client that sends nothing for so long in the middle of a request is given up."""
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 86400
"""Between these lies how long a file may be asked to be kept."""
CALLER = web.RequestKey("caller", Caller)
_UNITS_S = {"m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
_NAMED = re.compile(r"field `([^`]*)`")


def tenant(request: web.Request) -> str:
    """The tenant of the caller, whom the guard has let in."""
    return request[CALLER].tenant


async def json_body(request: web.Request, kind: type[Body]) -> Body:
    """The body as `kind`, a msgspec struct that forbids unknown fields. Raises FieldError, InvalidError."""
    try:
        async with asyncio.timeout(STALL_S):
            content = await request.read()
    except TimeoutError:
        raise stalled() from None
    except BROKEN as error:
        raise InvalidError("the body breaks off") from error
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        found = [match[1] for match in (_PLACE.search(str(error)), _NAMED.search(str(error))) if match]
        raise FieldError(".".join(found), _PLACE.sub("", str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidError(f"the body is not JSON: {error}") from None


def stalled() -> ResourceError:
    """The refusal of a request that does not come to its end."""
    return ResourceError(Reason.TIMEOUT, f"nothing more of the request came for {STALL_S:.0f} s", "Send it again.")


def page_query(request: web.Request, default: int, most: int) -> PageQuery:
    """`limit`, `after`, `order`. Raises FieldError."""
    query = request.query
    limit, order = query.get("limit", str(default)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= most):
        raise FieldError("limit", f"limit must be a number in [1, {most}]")
    if order not in ("asc", "desc"):
        raise FieldError("order", "order must be asc or desc")
    return PageQuery(int(limit), query.get("after", ""), order == "asc")


def window_s(window: str) -> float:
    """A completion window, such as "24h", in seconds. Raises FieldError."""
    match = _WINDOW.fullmatch(window)
    if match is None:
        raise FieldError("completion_window", "completion_window must be like 24h: a number and m, h or d")
    return int(match[1]) * _UNITS_S[match[2]]


def json_response(value: Any) -> web.Response:
    """A JSON answer that no cache keeps."""
    return web.Response(
        body=msgspec.json.encode(value), content_type="application/json", headers={"Cache-Control": "no-store"}
    )
