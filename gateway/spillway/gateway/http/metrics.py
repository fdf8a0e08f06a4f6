"""The gateway's figures for Prometheus: counted calls, and at each scrape a look at the jobs.

No label takes what a client chose: models are labelled only if an agent serves them, else they are `other`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spillway.gateway.service.fleet import Fleet
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.state import State

MAX_MODELS = 100
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WITH_LINES = (State.RUNNING, State.PAUSED)


class GatewayMetrics:
    """Takes note of calls over gRPC (as its `Observer`) and HTTP; `watch` adds the jobs."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._rpc_s = Histogram(
            "spillway_gateway_rpc_seconds",
            "Calls over gRPC with one answer, by how they ended. Lease may wait for lines as long as it was asked to.",
            ["method", "code"],
            registry=self._registry,
            buckets=_BUCKETS_S,
        )
        self._streams = PrometheusCounter(
            "spillway_gateway_streams",
            "Calls over gRPC with a stream of answers that are over, by how they ended.",
            ["method", "code"],
            registry=self._registry,
        )
        self._http_s = Histogram(
            "spillway_gateway_http_seconds",
            "Calls over HTTP until the answer began, by route and status.",
            ["route", "method", "status"],
            registry=self._registry,
            buckets=_BUCKETS_S,
        )

    def answered(self, method: str, code: str, seconds: float) -> None:
        """A call over gRPC with one answer is over."""
        self._rpc_s.labels(method, code).observe(seconds)

    def streamed(self, method: str, code: str) -> None:
        """A call over gRPC with a stream of answers is over."""
        self._streams.labels(method, code).inc()

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A call over HTTP is answered; `route` is the pattern of its path."""
        self._http_s.labels(route, method, str(status)).observe(seconds)

    def watch(self, ownership: Ownership) -> None:
        """Adds the figures of a gateway's jobs, and whether it has any."""
        self._registry.register(JobCollector(ownership))

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class JobCollector(Collector):
    """Jobs, lines, leases and agents, under ``spillway_gateway_``, where they are. For the event loop's thread."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    def describe(self) -> list[Metric]:
        """Nothing beforehand: names never clash with those of calls."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        owns, generation = self._ownership.owns, self._ownership.generation
        yield GaugeMetricFamily("spillway_gateway_owner", "1: has the jobs. 0: passes calls on.", value=owns)
        yield GaugeMetricFamily("spillway_gateway_generation", "Of the owner, as far as known.", value=generation)
        if not owns:
            return
        coordinator = self._ownership.coordinator
        jobs, counts = coordinator.jobs(), coordinator.counts
        yield from _kept(jobs)
        yield from _queues(jobs, coordinator.fleet)
        for name, text, value in (
            ("jobs_submitted", "Jobs accepted.", counts.jobs_submitted),
            ("input_bytes", "Bytes of their inputs.", counts.input_bytes),
            ("lines_leased", "Lines handed out to agents, again included.", counts.lines_leased),
            ("lines_completed", "Lines that agents answered; first results only.", counts.lines_completed),
            ("lines_failed", "Lines that agents failed for good, or that were given up.", counts.lines_failed),
            ("leases_granted", "Leases given to agents.", counts.leases_granted),
            ("leases_expired", "Leases that ran out.", counts.leases_expired),
        ):
            yield CounterMetricFamily(f"spillway_gateway_{name}", f"{text} Since the start.", value=value)
        held = sum(job.num_leases for job in jobs)
        yield GaugeMetricFamily("spillway_gateway_leases", "Leases held by agents now.", value=held)


def _queues(jobs: list[ServedJob], fleet: Fleet) -> Iterator[Metric]:
    names = set(fleet.models[:MAX_MODELS])
    depth: Counter[str] = Counter(dict.fromkeys(names, 0))
    oldest: dict[str, float] = dict.fromkeys(names, 0.0)
    for job in jobs:
        pending = job.counts().pending
        if job.state in _WITH_LINES and pending:
            model = job.spec.request.model if job.spec.request.model in names else "other"
            depth[model] += pending - job.num_leased
            oldest[model] = max(oldest.get(model, 0.0), time.time() - job.spec.created_s)
    agents = Counter(agent.model if agent.model in names else "other" for agent in fleet.agents)
    for name, text, values in (
        ("queue_lines", "Lines that wait for an agent, those of paused jobs included.", depth),
        ("oldest_pending_seconds", "Age of the oldest job with lines that have no result.", oldest),
        ("agents", "Agents heard of in the last ten minutes.", agents),
    ):
        family = GaugeMetricFamily(f"spillway_gateway_{name}", text, labels=["model"])
        for model, value in sorted(dict(values).items()):
            family.add_metric([model], value)
        yield family


def _kept(jobs: list[ServedJob]) -> Iterator[Metric]:
    """What is in the data directory: these figures fall when jobs are deleted."""
    states = Counter(job.state for job in jobs)
    family = GaugeMetricFamily("spillway_gateway_jobs", "Jobs kept, by state.", labels=["state"])
    for state in State:
        family.add_metric([state.name.lower()], states[state])
    yield family
    lines: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    for job in jobs:
        counts = job.counts()
        lines.update(completed=counts.completed, failed=counts.failed, leased=job.num_leased)
        lines.update(waiting=counts.pending - job.num_leased)
        codes.update(counts.errors_by_code)
    results = GaugeMetricFamily("spillway_gateway_lines", "Lines of jobs kept, by how they stand.", labels=["result"])
    for result in ("completed", "failed", "leased", "waiting"):
        results.add_metric([result], lines[result])
    yield results
    errors = GaugeMetricFamily("spillway_gateway_line_errors", "Failed lines of jobs kept, by code.", labels=["code"])
    for name, number in sorted(codes.items()):
        errors.add_metric([name], number)
    yield errors
