"""Traces: spans as values, their names on the wire (W3C trace context), and which traces are kept.

Nothing here knows OpenTelemetry: `otlp.py` does, and is imported where traces are asked for. Whoever is told of a span,
once it is over, must not block: spans end in event loops and between two steps of an engine.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

TRACEPARENT_VARIABLE = "TRACEPARENT"
"""Where commands look for the span that they are run under, as other tools do."""
Attribute = str | int | float | bool
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


class SpanKind(Enum):
    """What a span is in a call between processes."""

    INTERNAL = auto()
    SERVER = auto()
    CLIENT = auto()


@dataclass(frozen=True, slots=True)
class SpanContext:
    """Names a span: ids of 128 and 64 bits that are not zero. `sampled`: its trace is kept."""

    trace_id: int
    span_id: int
    sampled: bool = True

    def __str__(self) -> str:
        """As the header `traceparent` has it (W3C Trace Context, version 00)."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{_SAMPLED if self.sampled else 0:02x}"

    @classmethod
    def parse(cls, traceparent: str) -> SpanContext | None:
        """What a `traceparent` names; None for what is none, which is to be taken as if it had not been there."""
        match = _TRACEPARENT.fullmatch(traceparent)
        if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
            return None
        trace_id, span_id, flags = (int(match[group], 16) for group in (2, 3, 4))
        return cls(trace_id, span_id, bool(flags & _SAMPLED)) if trace_id and span_id else None


@dataclass(frozen=True, slots=True)
class Span:
    """Something that was done, from `start_s` to `end_s` in Unix seconds. `error` says why it failed, if it did."""

    name: str
    context: SpanContext
    parent: SpanContext | None
    kind: SpanKind
    start_s: float
    end_s: float
    attributes: Mapping[str, Attribute]
    error: str = ""


Sink = Callable[[Span], None]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Which traces are kept: a share of those that begin here; of a caller's, with `follow`, those that it keeps."""

    share: float = 1.0
    follow: bool = True

    def keeps(self, trace_id: int, caller: SpanContext | None) -> bool:
        """Whether a trace is kept; all who have the same share decide alike, for it follows from the id."""
        if self.follow and caller is not None:
            return caller.sampled
        return trace_id & (2**64 - 1) < round(self.share * 2**64)


class OpenSpan:
    """A span that has begun. Of a trace that nobody keeps it is `NO_SPAN`, and everything here is for nothing."""

    __slots__ = ("_sink", "context", "kind", "name", "parent", "start_s")

    def __init__(self, sink: Sink | None, name: str, context: SpanContext, parent: SpanContext | None = None) -> None:
        self._sink, self.name, self.context, self.parent = sink, name, context, parent
        self.kind, self.start_s = SpanKind.INTERNAL, time.time()

    @property
    def traced(self) -> bool:
        """Whether it will be told of."""
        return self._sink is not None

    @property
    def traceparent(self) -> str:
        """For those who are to hang their spans below this one; empty if nobody is."""
        return str(self.context) if self.traced else ""

    def child(self, name: str, kind: SpanKind = SpanKind.INTERNAL, start_s: float | None = None) -> OpenSpan:
        """Begins a span below it, now or at an earlier time."""
        if self._sink is None:
            return self
        span = OpenSpan(self._sink, name, SpanContext(self.context.trace_id, _new_id(8)), self.context)
        span.kind, span.start_s = kind, span.start_s if start_s is None else start_s
        return span

    def end(
        self, attributes: Mapping[str, Attribute] | None = None, *, error: str = "", end_s: float | None = None
    ) -> None:
        """Tells of it; `end_s`: if it was over earlier than now."""
        if self._sink is not None:
            end_s = time.time() if end_s is None else end_s
            span = Span(self.name, self.context, self.parent, self.kind, self.start_s, end_s, attributes or {}, error)
            self._sink(span)


NO_SPAN = OpenSpan(None, "", SpanContext(0, 0, sampled=False))


@dataclass(frozen=True, slots=True)
class Traces:
    """Where spans go, and which; the default keeps none."""

    sink: Sink | None = None
    sampler: Sampler = field(default_factory=Sampler)

    def begin(self, name: str, traceparent: str = "") -> OpenSpan:
        """A span below that of a caller, or else the first of a new trace."""
        if self.sink is None:
            return NO_SPAN
        caller = SpanContext.parse(traceparent)
        trace_id = _new_id(16) if caller is None else caller.trace_id
        if not self.sampler.keeps(trace_id, caller):
            return NO_SPAN
        return OpenSpan(self.sink, name, SpanContext(trace_id, _new_id(8)), caller)

    def follow(self, name: str, traceparent: str, kind: SpanKind = SpanKind.INTERNAL) -> OpenSpan:
        """A span below one of ours in another process, which has decided whether the trace is kept."""
        caller = SpanContext.parse(traceparent)
        if self.sink is None or caller is None or not caller.sampled:
            return NO_SPAN
        span = OpenSpan(self.sink, name, SpanContext(caller.trace_id, _new_id(8)), caller)
        span.kind = kind
        return span

    def resume(self, name: str, own: str, parent: str, start_s: float) -> OpenSpan:
        """A span that was begun before, perhaps by a process that is no more. `own`, `parent`: as `traceparent`."""
        context = SpanContext.parse(own)
        if self.sink is None or context is None:
            return NO_SPAN
        span = OpenSpan(self.sink, name, context, SpanContext.parse(parent))
        span.start_s = start_s
        return span


def _new_id(num_bytes: int) -> int:
    return secrets.randbelow(2 ** (8 * num_bytes) - 1) + 1
