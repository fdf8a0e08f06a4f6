"""Slow work in threads, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def to_the_end(call: Callable[..., object], *args: object, on_cancel: Callable[[], None] = lambda: None) -> None:
    """Runs a call in a thread. Being cancelled waits for its end: what it works on is not pulled away under it.

    `on_cancel` may tell the call to end soon.
    """
    work = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        on_cancel()
        await asyncio.wait([work])
        work.cancelled() or work.exception()
        raise
