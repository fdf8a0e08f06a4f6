"""Spans of what an agent does under a lease, below the gateway's span of it.

    work                    from the lease's arrival until its last line is reported or taken away
      ├─ prefill            from the first step that ran a prompt of it to the one that gave the last first token
      ├─ decode             from its first token to its last
      └─ complete           a call that reports results; the first `REPORTS_OF_A_LEASE` of them

That is at most a handful of spans a lease, and none a token. Leases without a trace cost a look into an empty dict.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from spillway.api.errors import LineError
from spillway.api.tracing import NO_SPAN, Attribute, OpenSpan, SpanKind, Traces
from spillway.node_agent.agent.desk import LeasedLine
from spillway.node_agent.engine import Phase
from spillway.node_agent.lines import LineAnswer

REPORTS_OF_A_LEASE = 16
Key = tuple[str, int]
"""Lease and line."""


@dataclass(slots=True)
class _Stretch:
    """Steps of the engine in which something was done; `span` from the first of them on."""

    span: OpenSpan = NO_SPAN
    end_s: float = 0.0
    steps: int = 0

    def note(self, work: OpenSpan, name: str, began_s: float, now_s: float) -> None:
        if not self.steps:
            self.span = work.child(name, start_s=began_s)
        self.steps, self.end_s = self.steps + 1, now_s

    def tell(self, tokens: Mapping[str, int]) -> None:
        self.span.end({"spillway.steps": self.steps, **tokens}, end_s=self.end_s)


@dataclass(slots=True)
class _Traced:
    """One lease. `new`: lines without a token; `open`: all that the engine has not ended; `held`: not yet reported."""

    work: OpenSpan
    about: Mapping[str, Attribute]
    lines: int
    held: int
    new: set[Key]
    open: set[Key]
    prefill: _Stretch = field(default_factory=_Stretch)
    decode: _Stretch = field(default_factory=_Stretch)
    reports: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def step(self, steps: _Step) -> None:
        decoding = len(self.open) > len(self.new)
        phases = {key: Phase.DECODE if key in steps.ended else steps.phase_of(key) for key in self.new}
        if any(phase is not Phase.WAITING for phase in phases.values()):
            self.prefill.note(self.work, "prefill", steps.began_s, steps.now_s)
        self.new -= {key for key, phase in phases.items() if phase is Phase.DECODE}
        if decoding:
            self.decode.note(self.work, "decode", steps.began_s, steps.now_s)
        for key in self.open & steps.ended.keys():
            result = steps.ended[key]
            if isinstance(result, LineAnswer):
                self.prompt_tokens += result.prompt_tokens
                self.completion_tokens += result.completion_tokens
        self.open -= steps.ended.keys()

    def tell_of_steps(self) -> None:
        self.prefill.tell({"gen_ai.usage.input_tokens": self.prompt_tokens})
        self.decode.tell({"gen_ai.usage.output_tokens": self.completion_tokens})

    def over(self, end: str) -> None:
        if self.open:
            self.tell_of_steps()
        lost = f"{self.held} of {self.lines} lines were taken back" if end == "lost" else ""
        tokens = {
            "gen_ai.usage.input_tokens": self.prompt_tokens,
            "gen_ai.usage.output_tokens": self.completion_tokens,
        }
        self.work.end({**self.about, "spillway.lines": self.lines, "spillway.end": end, **tokens}, error=lost)


@dataclass(frozen=True, slots=True)
class _Step:
    began_s: float
    now_s: float
    phase_of: Callable[[Key], Phase]
    ended: Mapping[Key, LineAnswer | LineError]


class LeaseTraces:
    """Thread-safe: the wire's loop and the engine's thread both tell what they do."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces
        self._lock = threading.Lock()
        self._leases: dict[str, _Traced] = {}

    # the wire's side

    def leased(self, lines: list[LeasedLine], traceparent: str, worker: str, model: str) -> None:
        """Lines of one lease are here, and not on the desk yet; `traceparent` is the gateway's span of it, if any."""
        work = self._traces.follow("work", traceparent)
        if work.traced:
            about = {"spillway.worker": worker, "gen_ai.request.model": model}
            keys = {line.key for line in lines}
            with self._lock:
                self._leases[lines[0].lease] = _Traced(work, about, len(lines), len(lines), set(keys), keys)

    def reporting(self, lease: str) -> OpenSpan:
        """A call begins that reports lines of a lease; to be ended by the caller."""
        with self._lock:
            traced = self._leases.get(lease)
            if traced is None or traced.reports >= REPORTS_OF_A_LEASE:
                return NO_SPAN
            traced.reports += 1
            return traced.work.child("complete", SpanKind.CLIENT)

    def reported(self, lease: str, lines: int) -> None:
        """So many lines are off the desk."""
        with self._lock:
            traced = self._leases.get(lease)
            if traced is None:
                return
            traced.held -= lines
            if traced.held <= 0:
                del self._leases[lease]
                traced.over("done")

    def over(self, leases: Iterable[str], end: str) -> None:
        """Leases were lost, or their lines handed back."""
        with self._lock:
            for lease in leases:
                traced = self._leases.pop(lease, None)
                if traced is not None:
                    traced.over(end)

    # the engine's side

    def stepped(
        self, began_s: float, phase_of: Callable[[Key], Phase], ended: Iterable[tuple[Key, LineAnswer | LineError]]
    ) -> None:
        """The engine made a step."""
        if not self._leases:
            return
        step = _Step(began_s, time.time(), phase_of, dict(ended))
        with self._lock:
            for traced in self._leases.values():
                if traced.open:
                    traced.step(step)
                    if not traced.open:
                        traced.tell_of_steps()

    def refused(self, key: Key) -> None:
        """A line never came to the engine."""
        with self._lock:
            traced = self._leases.get(key[0])
            if traced is not None:
                traced.new.discard(key)
                traced.open.discard(key)
                if not traced.open:
                    traced.tell_of_steps()
