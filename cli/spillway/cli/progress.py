"""Live progress of a run: a bar on a terminal, a plain line now and then elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:  # it brings torch, and those who only show durations need none
    from spillway.cli.drive import Tally

PLAIN_INTERVAL_S = 10.0
RATE_WINDOW_S = 60.0


class RunProgress:
    """Shows lines done of ``total`` (of which ``before`` were done by earlier runs), tokens per second, and an ETA."""

    def __init__(self, total: int, before: int) -> None:
        self._total, self._before = total, before
        self._started = self._printed = time.monotonic()
        self._window: deque[tuple[float, int, int]] = deque([(self._started, 0, 0)])
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]spillway"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("lines", total=total, completed=before, note="")

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, tally: Tally) -> None:
        """Called after every step."""
        now = time.monotonic()
        finished = tally.lines_done + tally.lines_failed
        if self._bar is not None:
            self._bar.update(self._task, completed=self._before + finished, note=self._note(now, tally))
        elif now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            done = self._before + finished
            print(f"spillway: {done}/{self._total} lines, {self._note(now, tally)}", file=sys.stderr, flush=True)

    def _note(self, now: float, tally: Tally) -> str:
        finished = tally.lines_done + tally.lines_failed
        tokens = tally.model_tokens
        if now - self._window[-1][0] >= 1.0:
            self._window.append((now, finished, tokens))
        while len(self._window) > 2 and now - self._window[1][0] > RATE_WINDOW_S:
            self._window.popleft()
        since, lines_then, tokens_then = self._window[0]
        seconds = max(now - since, 1e-9)
        rate = (finished - lines_then) / seconds
        left = self._total - self._before - finished
        eta = format_duration(left / rate) if rate > 0 else "unknown"
        return f"{(tokens - tokens_then) / seconds:,.0f} tokens/s, ETA {eta}"


def format_duration(seconds: float) -> str:
    """``3h 05m``, ``12m 30s``, ``45s``."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"
