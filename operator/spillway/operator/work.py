"""Which objects are to be looked at, and when: each once, however many events told of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from spillway.api.errors import SpillwayError

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.2
_MAX_RETRY_S = 30.0

Reconcile = Callable[[str, str, float], Awaitable[float | None]]
"""Of (namespace, name, Unix seconds) to when to look again at the latest."""


class Work:
    """One look at a time. What fails is looked at again, later each time."""

    def __init__(self, reconcile: Reconcile) -> None:
        self._reconcile = reconcile
        self._due_s: dict[tuple[str, str], float] = {}
        self._failures: dict[tuple[str, str], int] = {}
        self._added = asyncio.Event()

    def add(self, namespace: str, name: str, due_s: float = 0.0) -> None:
        """Look at this object, at `due_s` (Unix) at the latest. From the loop's own thread only."""
        key = (namespace, name)
        self._due_s[key] = min(due_s, self._due_s.get(key, due_s))
        self._added.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._added.clear()
            key = min(self._due_s, key=self._due_s.__getitem__, default=None)
            rest_s = None if key is None else self._due_s[key] - time.time()
            if key is None or (rest_s is not None and rest_s > 0):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rest_s):
                        await self._added.wait()
                continue
            del self._due_s[key]
            await self._look(*key)

    async def _look(self, namespace: str, name: str) -> None:
        key = (namespace, name)
        try:
            wake_s = await self._reconcile(namespace, name, time.time())
        except SpillwayError as error:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            rest_s = min(_FIRST_RETRY_S * 2.0 ** min(failures - 1, 16), _MAX_RETRY_S)
            log.warning("%s/%s: %s; again in %.1f s", namespace, name, error, rest_s)
            wake_s = time.time() + rest_s
        else:
            self._failures.pop(key, None)
        if wake_s is not None:
            self.add(namespace, name, wake_s)
