"""The agent's figures for Prometheus; a scrape reads the counters that are kept anyway."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spillway.kvstore.metrics import StoreCollector
from spillway.kvstore.stats import StoreStats
from spillway.node_agent.agent.desk import Desk
from spillway.node_agent.agent.wire import Wire
from spillway.node_agent.agent.worker import Worker
from spillway.node_agent.engine import EngineStats


class AgentCollector(Collector):
    """Metrics under ``spillway_agent_``, ``spillway_engine_`` and, where there is a store, ``spillway_kv_``."""

    def __init__(self, desk: Desk, wire: Wire, worker: Worker) -> None:
        self._desk, self._wire, self._worker = desk, wire, worker

    def describe(self) -> list[Metric]:
        """Nothing beforehand: a scrape may find no engine yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        counts = self._desk.counts
        for name, text, value in (
            ("lines_leased", "Lines taken from the gateway.", counts.lines_taken),
            ("lines_answered", "Lines that got an answer here.", counts.lines_answered),
            ("lines_failed", "Lines that got an error here.", counts.lines_failed),
            ("lines_dropped", "Lines thrown away because their lease was lost.", counts.lines_dropped),
            ("leases_lost", "Leases that ran out or were revoked.", counts.leases_lost),
            ("prompt_tokens", "Prompt tokens of answered lines.", counts.prompt_tokens),
            ("completion_tokens", "Generated tokens of answered lines.", counts.completion_tokens),
            ("calls", "Calls to the gateway.", self._wire.calls),
            ("failed_calls", "Calls that found no usable gateway.", self._wire.failed_calls),
        ):
            yield CounterMetricFamily(f"spillway_agent_{name}", text, value=value)
        held = self._desk.max_lines - self._desk.room
        yield GaugeMetricFamily("spillway_agent_lines_held", "Lines under a lease now.", value=held)
        up = 0 if self._wire.trouble else 1
        yield GaugeMetricFamily("spillway_agent_gateway_up", "Whether the last call was answered.", value=up)
        loaded = self._worker.loaded
        if loaded is not None:
            stats = loaded.engine.stats()
            yield from _engine(stats)
            if stats.store is not None:
                yield from StoreCollector(lambda: _known(loaded.engine.stats().store)).collect()


def _engine(stats: EngineStats) -> Iterator[Metric]:
    scheduler = stats.scheduler
    for name, text, value in (
        ("steps", "Steps run.", scheduler.steps),
        ("step_tokens", "Tokens the model ran over.", scheduler.step_tokens),
        ("generated_tokens", "Tokens sampled.", stats.generated_tokens),
        ("prompt_tokens", "Prompt tokens admitted.", scheduler.prompt_tokens),
        ("reused_tokens", "Prompt tokens whose KV was found instead of computed.", scheduler.reused_tokens),
        ("preemptions", "Sequences that had to make room.", scheduler.preemptions),
    ):
        yield CounterMetricFamily(f"spillway_engine_{name}", text, value=value)
    for name, text, value in (
        ("pool_blocks", "Blocks of the device pool.", stats.pool_blocks),
        ("pool_used_blocks", "Blocks that sequences hold.", stats.pool_used),
        ("pool_cached_blocks", "Blocks kept for their content.", stats.pool_cached),
    ):
        yield GaugeMetricFamily(f"spillway_engine_{name}", text, value=value)


def _known(stats: StoreStats | None) -> StoreStats:
    assert stats is not None  # a store is there for good or not at all
    return stats
