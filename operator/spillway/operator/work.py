"""Which objects are to be looked at, and when: each once, however many events told of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from spillway.api.errors import SpillwayError
from spillway.operator.errors import ConflictError

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.2
_MAX_RETRY_S = 30.0

Reconcile = Callable[[str, str, float], Awaitable[float | None]]
"""Of (namespace, name, Unix seconds) to when to look again at the latest."""


class Work:
    """Objects of one kind. Several are looked at side by side, each by one at a time. What fails is looked at again,
    later each time.
    """

    def __init__(self, kind: str, reconcile: Reconcile, lanes: int = 1) -> None:
        self._kind, self._reconcile, self._lanes = kind, reconcile, lanes
        self._due_s: dict[tuple[str, str], float] = {}
        self._failures: dict[tuple[str, str], int] = {}
        self._busy: set[tuple[str, str]] = set()
        self._changed = asyncio.Event()

    def add(self, namespace: str, name: str, due_s: float = 0.0) -> None:
        """Look at this object, at `due_s` (Unix) at the latest. From the loop's own thread only."""
        key = (namespace, name)
        self._due_s[key] = min(due_s, self._due_s.get(key, due_s))
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled, or until a look raises what is no SpillwayError."""
        lanes = [asyncio.create_task(self._lane()) for _ in range(self._lanes)]
        try:
            await asyncio.gather(*lanes)
        finally:
            for lane in lanes:
                lane.cancel()

    async def _lane(self) -> None:
        while True:
            key = await self._next()
            self._busy.add(key)
            try:
                await self._look(*key)
            finally:
                self._busy.discard(key)
                self._changed.set()

    async def _next(self) -> tuple[str, str]:
        while True:
            key = min((key for key in self._due_s if key not in self._busy), key=self._due_s.__getitem__, default=None)
            rest_s = None if key is None else self._due_s[key] - time.time()
            if key is not None and rest_s is not None and rest_s <= 0:
                del self._due_s[key]
                return key
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await self._changed.wait()

    async def _look(self, namespace: str, name: str) -> None:
        key = (namespace, name)
        try:
            wake_s = await self._reconcile(namespace, name, time.time())
        except SpillwayError as error:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            rest_s = min(_FIRST_RETRY_S * 2.0 ** min(failures - 1, 16), _MAX_RETRY_S)
            # Somebody was faster: nothing that a person should hear of, unless it goes on.
            level = logging.DEBUG if isinstance(error, ConflictError) and failures <= 3 else logging.WARNING
            log.log(level, "%s %s/%s: %s; again in %.1f s", self._kind, namespace, name, error, rest_s)
            wake_s = time.time() + rest_s
        else:
            self._failures.pop(key, None)
        if wake_s is not None:
            self.add(namespace, name, wake_s)
