"""A receiver of traces by OTLP over gRPC, for tests: takes in what OpenTelemetry's exporters send."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

PATIENCE_S = 120.0


@dataclass(frozen=True)
class Received:
    """A span as it came over the wire; ids in hex, times in nanoseconds."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    error: str


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """All spans so far."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._spans: list[Received] = []
        self.port = 0

    @property
    def environment(self) -> dict[str, str]:
        """What has a program send its spans here, soon after they end."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.port}", "OTEL_BSP_SCHEDULE_DELAY": "100"}

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            for group in request.resource_spans:
                about = _attributes(group.resource.attributes)
                for scope in group.scope_spans:
                    self._spans += [_received(about["service.name"], span) for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace: str, *names: str) -> list[Received]:
        """Spans of a trace, once it has one of each of these names."""
        deadline_s = time.monotonic() + PATIENCE_S
        with self._changed:
            while True:
                found = [span for span in self._spans if span.trace == trace]
                missing = set(names) - {span.name for span in found}
                if not missing:
                    return found
                assert time.monotonic() < deadline_s, f"never came: {missing}; of {[span.name for span in found]}"
                self._changed.wait(1)

    def traces(self) -> set[str]:
        with self._changed:
            return {span.trace for span in self._spans}


def _received(service: str, span: Any) -> Received:
    return Received(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        span.status.message if span.status.code == 2 else "",
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Listens while the block lasts."""
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver
    finally:
        server.stop(None).wait()
