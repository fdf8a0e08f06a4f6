"""The trace of one job: what the gateway does with it, as spans, and what agents hang theirs on.

    job ── submit, validate, seal          from the call that submitted it to its end
      └─── lease                           from a grant until its lines are done or taken back
             ├─ work, prefill, decode, …   the agent's (node_agent.agent.lease_traces)
             └─ result                     results taken in; below the agent's `complete` where there is one

Whether a job is traced is settled when it is submitted, and kept in its spec. A long job has many leases: the first
`ALWAYS_TRACED` are traced, and of each doubling after that half as many of those that there are, so that a million of
them leave some 3,000.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from spillway.api.results import Usage
from spillway.api.tracing import NO_SPAN, Attribute, OpenSpan, SpanContext, SpanKind, Traces
from spillway.gateway.job import JobCounts
from spillway.gateway.service.leases import Lease, LeaseEnd
from spillway.gateway.service.spec import End, JobSpec, TraceRecord

ALWAYS_TRACED = 512
RESULTS_OF_A_LEASE = 16
"""Further calls that bring results of one lease have no span of their own."""


@dataclass(frozen=True, slots=True)
class Report:
    """Under which lease an agent brings results, and its own span, if it has one, as `traceparent`."""

    lease: str = ""
    traceparent: str = ""


@dataclass(slots=True)
class _Traced:
    span: OpenSpan
    lines: int
    worker: str
    reports: int = 0


def begin_trace(traces: Traces, traceparent: str) -> TraceRecord | None:
    """What a job's spec keeps of its trace; `traceparent` is that of the call that submits it. None: not traced."""
    span = traces.begin("job", traceparent)
    if not span.traced:
        return None
    return TraceRecord(str(span.context), "" if span.parent is None else str(span.parent))


class JobTrace:
    """Takes note of what happens with a job. For the event loop's thread; does nothing for a job without a trace."""

    def __init__(self, traces: Traces, spec: JobSpec) -> None:
        self._job = NO_SPAN
        if spec.trace is not None:
            self._job = traces.resume("job", spec.trace.span, spec.trace.parent, spec.began_s)
        self._number = 0
        self._leases: dict[str, _Traced] = {}

    def begin(self, name: str) -> OpenSpan:
        """A span of the job itself, to be ended by the caller."""
        return self._job.child(name)

    def submitted(self, spec: JobSpec) -> None:
        """The job was accepted."""
        self._job.child("submit", SpanKind.SERVER, self._job.start_s).end(
            {"spillway.input_bytes": spec.input_bytes, "spillway.input_lines": spec.input_lines}
        )

    def leased(self, lease: Lease) -> str:
        """Lines were handed out; what the agent is to hang its spans on, as `traceparent`, or empty."""
        number, self._number = self._number, self._number + 1
        if not self._job.traced or not is_traced(number):
            return ""
        span = self._job.child("lease", SpanKind.SERVER)
        self._leases[lease.id] = _Traced(span, len(lease.lines), lease.worker)
        return span.traceparent

    def lease_over(self, lease: Lease, end: LeaseEnd) -> None:
        """No line is left under a lease."""
        traced = self._leases.pop(lease.id, None)
        if traced is not None:
            _end_lease(traced, end)

    def begin_report(self, report: Report) -> OpenSpan:
        """An agent brings results; to be ended by the caller."""
        traced = self._leases.get(report.lease)
        if traced is None or traced.reports >= RESULTS_OF_A_LEASE:
            return NO_SPAN
        traced.reports += 1
        span, caller = traced.span.child("result", SpanKind.SERVER), SpanContext.parse(report.traceparent)
        if caller is not None and caller.trace_id == span.context.trace_id:
            span.parent = caller
        return span

    def ended(self, spec: JobSpec, counts: JobCounts, tokens: Usage) -> None:
        """The job is over."""
        for traced in self._leases.values():
            _end_lease(traced, LeaseEnd.RETURNED)
        self._leases.clear()
        outcome = spec.outcome
        failed = outcome is not None and outcome.end is End.FAILED
        self._job.end(
            {
                "spillway.job": f"jobs/{spec.id}",
                "spillway.state": "" if outcome is None else outcome.end.value,
                "spillway.lines": counts.total,
                "spillway.lines_completed": counts.completed,
                "spillway.lines_failed": counts.failed,
                "spillway.leases": self._number,
                "gen_ai.request.model": spec.request.model,
                "gen_ai.usage.input_tokens": tokens.prompt_tokens,
                "gen_ai.usage.output_tokens": tokens.completion_tokens,
            },
            error=outcome.message if failed and outcome is not None else "",
            end_s=time.time() if outcome is None else outcome.end_s,
        )


def is_traced(number: int) -> bool:
    """Whether the lease of this number (from 0) of a job has a span."""
    return number % (1 << (number // ALWAYS_TRACED).bit_length()) == 0


def _end_lease(traced: _Traced, end: LeaseEnd) -> None:
    attributes: dict[str, Attribute] = {
        "spillway.lines": traced.lines,
        "spillway.worker": traced.worker,
        "spillway.end": end.value,
    }
    traced.span.end(attributes, error="the lease ran out" if end is LeaseEnd.EXPIRED else "")
