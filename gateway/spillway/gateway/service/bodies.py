"""What agents send as results, checked before anything of it is kept."""

from __future__ import annotations

from spillway.api.results import Usage, usage_of
from spillway.gateway.service.errors import InvalidError, Reason


def checked_usage(body: bytes) -> Usage:
    """The tokens that a result states. Raises InvalidError for what is no result."""
    try:
        body.decode("utf-8")  # what a decoder skips it does not check
        used = usage_of(body)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f"a result is no JSON object: {error}", reason=Reason.BAD_RESULT) from None
    if b"\n" in body:
        raise InvalidError("a result must stand on one line", reason=Reason.BAD_RESULT)
    return used
