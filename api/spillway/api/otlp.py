"""Traces by OTLP over gRPC, as the standard OTEL_* variables ask for them. Needs the extra `traces`.

Read here: OTEL_TRACES_EXPORTER, OTEL_SDK_DISABLED, OTEL_TRACES_SAMPLER and its _ARG, the _PROTOCOL of the exporter.
OpenTelemetry's SDK reads the others: endpoint, headers, certificates, OTEL_BSP_*, OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spillway.api.errors import SpillwayError
from spillway.api.tracing import Sampler, Sink, Span, SpanContext, Traces

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger(__name__)

FLUSH_S = 3.0
"""So long the end of a process waits for its last spans to be sent."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SAMPLERS = ("always_on", "always_off", "traceidratio")
_FOLLOWING = "parentbased_"


class TracesError(SpillwayError):
    """Traces are asked for in a way that does not work here."""


@contextmanager
def tracing(service: str) -> Iterator[Traces]:
    """Takes spans inside the block; none, and imports nothing, unless the environment asks for them.

    `service` is the name that they are told under if the environment has none. Sending is done by a thread; what does
    not fit its queue is dropped. Raises TracesError.
    """
    if not is_wanted(os.environ):
        yield Traces()
        return
    sampler = sampler_of(os.environ)
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "grpc")
    if protocol != "grpc":
        raise TracesError(f"traces cannot be sent by {protocol!r}", f"Set {_PROTOCOLS[0]}=grpc, to a port for gRPC.")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        hint = "Install spillway[traces], or set OTEL_SDK_DISABLED=true."
        raise TracesError(f"the environment asks for traces, which takes a package more: {error}", hint) from error
    try:
        processor = BatchSpanProcessor(OTLPSpanExporter())
    except (ValueError, OSError) as error:
        raise TracesError(f"traces cannot be sent as the environment says: {error}") from error
    try:
        yield Traces(_sink(service, processor.on_end), sampler)
    finally:
        closing = threading.Thread(target=processor.shutdown, name="spillway-last-spans", daemon=True)
        closing.start()
        closing.join(FLUSH_S)
        if closing.is_alive():
            log.warning("the last spans could not be sent within %.0f s", FLUSH_S)


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the variables ask for traces: by OTEL_TRACES_EXPORTER=otlp, or by an endpoint. Raises TracesError."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none" or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if exporter not in ("", "otlp"):
        raise TracesError(f"OTEL_TRACES_EXPORTER is {exporter!r}", "Known: otlp, none.")
    return exporter == "otlp" or any(environment.get(name) for name in _ENDPOINTS)


def sampler_of(environment: Mapping[str, str]) -> Sampler:
    """As OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG say. Raises TracesError."""
    name = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower() or "parentbased_always_on"
    kind = name.removeprefix(_FOLLOWING)
    if kind not in _SAMPLERS:
        known = ", ".join([*_SAMPLERS, *(_FOLLOWING + each for each in _SAMPLERS)])
        raise TracesError(f"OTEL_TRACES_SAMPLER is {name!r}", f"Known: {known}.")
    text = environment.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or "1"
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if kind == "traceidratio" and not 0 <= share <= 1:
        raise TracesError(f"OTEL_TRACES_SAMPLER_ARG is {text!r}", "It is a share, between 0 and 1.")
    share = {"always_on": 1.0, "always_off": 0.0}.get(kind, share)
    return Sampler(share, follow=name.startswith(_FOLLOWING))


def _sink(service: str, on_end: Callable[[ReadableSpan], None]) -> Sink:
    """Makes of our spans those of the SDK, and hands them to its processor, which queues them."""
    from opentelemetry import trace
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    resource, scope = Resource.create(), InstrumentationScope("spillway")
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))

    def context_of(context: SpanContext, *, is_remote: bool) -> trace.SpanContext:
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if context.sampled else trace.TraceFlags.DEFAULT)
        return trace.SpanContext(context.trace_id, context.span_id, is_remote, flags)

    def take(span: Span) -> None:
        status = trace.Status(trace.StatusCode.ERROR, span.error) if span.error else trace.Status()
        on_end(
            ReadableSpan(
                name=span.name,
                context=context_of(span.context, is_remote=False),
                parent=None if span.parent is None else context_of(span.parent, is_remote=True),
                resource=resource,
                attributes=dict(span.attributes),
                kind=trace.SpanKind[span.kind.name],
                status=status,
                start_time=round(span.start_s * 1e9),
                end_time=round(span.end_s * 1e9),
                instrumentation_scope=scope,
            )
        )

    return take
