"""What the part of an index that nodes share has just answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class NearCache(Generic[_Key, _Value]):
    """Answers that are used again for a moment. Full, it forgets them all. Thread-safe."""

    def __init__(self, seconds: float, most: int) -> None:
        """``seconds``: how long an answer is used. ``most``: answers kept."""
        self._seconds = seconds
        self._most = most
        self._answers: dict[_Key, tuple[float, _Value]] = {}
        self._lock = threading.Lock()

    def recall(self, keys: Iterable[_Key]) -> dict[_Key, _Value]:
        """What is known of ``keys``."""
        now = time.monotonic()
        answers = self._answers
        found = ((key, answers.get(key)) for key in keys)
        return {key: answer[1] for key, answer in found if answer is not None and answer[0] > now}

    def learn(self, answers: Mapping[_Key, _Value]) -> None:
        """Keep ``answers``."""
        if self._seconds == 0:
            return
        ends = time.monotonic() + self._seconds
        with self._lock:
            if len(self._answers) + len(answers) > self._most:
                self._answers = {}
            if len(answers) <= self._most:
                self._answers.update((key, (ends, answer)) for key, answer in answers.items())
