"""How fast a job goes, and between which times it will end. Pure: whoever calls says what time it is."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

WINDOW_S = 300.0
"""The band rests on what happened in this time."""
RATE_WINDOW_S = 60.0
SAMPLE_S = 5.0
MIN_SAMPLES = 3
DEVIATIONS = 2.0
"""Half the width of the band, in standard errors of the rate."""
SLOWEST = 0.2
"""The late end of the band assumes at least this share of the mean rate."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was done by a time. `tokens` are prompt and completion tokens of finished lines."""

    time_s: float
    lines: int
    tokens: int


class Pace:
    """Rates of one job while it runs here. After a restart of the gateway it begins anew."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def note(self, now: Sample) -> None:
        """Called often; a sample is kept every SAMPLE_S."""
        if self._samples and now.time_s - self._samples[-1].time_s < SAMPLE_S:
            return
        self._samples.append(now)
        while now.time_s - self._samples[0].time_s > WINDOW_S:
            self._samples.popleft()

    def pause(self) -> None:
        """Nothing runs, and that is nobody's slowness: forgets what was."""
        self._samples.clear()

    def tokens_per_s(self, now: Sample) -> float:
        """Over the last RATE_WINDOW_S; 0 before anything can be said."""
        since = next((each for each in self._samples if now.time_s - each.time_s <= RATE_WINDOW_S), now)
        return (now.tokens - since.tokens) / (now.time_s - since.time_s) if now.time_s > since.time_s else 0.0

    def end_band_s(self, now: Sample, lines_left: int) -> tuple[float, float] | None:
        """Seconds from now between which the last line should end; None while too little is known.

        The rate of lines is taken as the mean over the window, its error from how much samples differ, and at least as
        large as for lines that end independently of each other (Poisson: variance = count).
        """
        times = [*self._samples, now] if self._samples and now.time_s > self._samples[-1].time_s else []
        done = times[-1].lines - times[0].lines if times else 0
        if len(times) <= MIN_SAMPLES or done <= 0:
            return None
        total_s = times[-1].time_s - times[0].time_s
        mean = done / total_s
        steps = list(zip(times, list(times)[1:], strict=False))
        squares = sum(
            (second.time_s - first.time_s) * ((second.lines - first.lines) / (second.time_s - first.time_s) - mean) ** 2
            for first, second in steps
        )
        error = max(math.sqrt(squares / total_s / max(1, len(steps) - 1)), math.sqrt(done) / total_s)
        slow = max(mean - DEVIATIONS * error, SLOWEST * mean)
        return lines_left / (mean + DEVIATIONS * error), lines_left / slow
