"""Traces: what a `traceparent` says, which traces are kept, and that nothing is there where nobody asks for it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillway.api.otlp import TracesError, is_wanted, sampler_of, tracing
from spillway.api.tracing import NO_SPAN, Sampler, Span, SpanContext, SpanKind, Traces

CALLER = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
UNSAMPLED = CALLER[:-1] + "0"


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_a_context_survives_the_wire(trace_id: int, span_id: int, sampled: bool) -> None:
    context = SpanContext(trace_id, span_id, sampled)
    assert SpanContext.parse(str(context)) == context
    assert len(str(context)) == 55


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        CALLER.upper(),
        CALLER[:-1],
        CALLER + "-more",  # version 00 has no more
        "ff" + CALLER[2:],
        CALLER.replace("0123456789abcdef0123456789abcdef", "0" * 32),
        CALLER.replace("-0123456789abcdef-", "-0000000000000000-"),
        CALLER + "\n",
    ],
)
def test_what_is_no_traceparent_is_taken_as_none(text: str) -> None:
    assert SpanContext.parse(text) is None


def test_later_versions_may_say_more() -> None:
    assert SpanContext.parse("01" + CALLER[2:] + "-more") == SpanContext.parse(CALLER)


def test_spans_hang_on_each_other_and_are_told_when_they_end() -> None:
    told: list[Span] = []
    began_s = time.time()
    first = Traces(told.append).begin("job", CALLER)
    second = first.child("lease", SpanKind.SERVER, start_s=5.0)
    assert told == []
    second.end({"lines": 3}, error="lost", end_s=7.0)
    first.end()
    inner, outer = told
    assert (inner.name, inner.kind, inner.start_s, inner.end_s) == ("lease", SpanKind.SERVER, 5.0, 7.0)
    assert (inner.attributes, inner.error) == ({"lines": 3}, "lost")
    assert inner.parent == outer.context
    assert outer.parent == SpanContext.parse(CALLER)
    assert {inner.context.trace_id, outer.context.trace_id} == {0x0123456789ABCDEF0123456789ABCDEF}
    assert began_s <= outer.start_s <= outer.end_s
    assert SpanContext.parse(second.traceparent) == second.context


def test_a_span_goes_on_in_another_process() -> None:
    told: list[Span] = []
    first = Traces(told.append).begin("job", CALLER)
    Traces(told.append).resume("job", first.traceparent, CALLER, 3.0).end()
    Traces(told.append).follow("work", first.traceparent).end()
    assert (told[0].context, told[0].parent, told[0].start_s) == (first.context, SpanContext.parse(CALLER), 3.0)
    assert told[1].parent == first.context


def test_where_nobody_listens_or_the_caller_keeps_nothing_there_is_nothing() -> None:
    told: list[Span] = []
    for span in (
        Traces().begin("job", CALLER),
        Traces(told.append).begin("job", UNSAMPLED),
        Traces(told.append, Sampler(0.0)).begin("job"),
        Traces(told.append).follow("work", UNSAMPLED),
        Traces(told.append).follow("work", ""),
        Traces(told.append).resume("job", "", "", 0.0),
    ):
        assert not span.traced
        assert span.child("more").traceparent == ""
        span.end({"a": 1})
    assert told == []
    assert NO_SPAN.child("x") is NO_SPAN


def test_a_share_of_traces_is_the_same_share_for_all() -> None:
    half = Sampler(0.5)
    kept = [half.keeps(number << 44, None) for number in range(0, 2**20, 4099)]
    assert 0.45 < sum(kept) / len(kept) < 0.55
    assert kept == [Sampler(0.5, follow=False).keeps(number << 44, None) for number in range(0, 2**20, 4099)]
    unsampled = SpanContext.parse(UNSAMPLED)
    assert not Sampler(1.0).keeps(1, unsampled)
    assert Sampler(1.0, follow=False).keeps(1, unsampled)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_the_environment_asks_for_traces(environment: dict[str, str], wanted: bool) -> None:
    assert is_wanted(environment) is wanted


@pytest.mark.parametrize(
    ("name", "argument", "sampler"),
    [
        ("", "", Sampler(1.0)),
        ("always_on", "", Sampler(1.0, follow=False)),
        ("always_off", "0.5", Sampler(0.0, follow=False)),
        ("traceidratio", "0.25", Sampler(0.25, follow=False)),
        ("ParentBased_TraceIdRatio", " 0.25 ", Sampler(0.25)),
        ("parentbased_always_off", "", Sampler(0.0)),
    ],
)
def test_the_environment_says_which(name: str, argument: str, sampler: Sampler) -> None:
    assert sampler_of({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument}) == sampler


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "jaeger_remote"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "x"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"},
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TracesError), tracing("x"):
        pass


def test_nothing_is_imported_where_nobody_asks() -> None:
    program = """
import sys
from spillway.api.otlp import tracing
with tracing("x") as traces:
    assert not traces.begin("job").traced
assert not [name for name in sys.modules if name.startswith(("opentelemetry", "grpc"))]
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
