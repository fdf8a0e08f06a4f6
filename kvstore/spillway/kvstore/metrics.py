"""A store's figures for Prometheus. Nothing is counted twice: a scrape reads `BlockStore.stats`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from .index.base import IndexStats
from .stats import Latencies, StoreStats, TierStats

_BREAKER = {"closed": 0, "probing": 1, "open": 2}

_TIER_GAUGES: dict[str, tuple[str, Callable[[TierStats], float]]] = {
    "blocks": ("Blocks held.", lambda tier: tier.blocks),
    "bytes": ("Bytes of memory or files allocated, metadata included.", lambda tier: tier.bytes),
    "budget_bytes": ("Bytes the tier may allocate.", lambda tier: tier.budget_bytes),
    "foreign_blocks": ("Blocks of another identity: never served, evicted first.", lambda tier: tier.foreign_blocks),
    "damaged": ("Headers and files found damaged when the tier was opened.", lambda tier: tier.damaged),
    "lost_slots": ("Slots given up after an I/O error.", lambda tier: tier.lost_slots),
    "breaker_state": ("0 closed, 1 probing, 2 open.", lambda tier: _BREAKER[tier.breaker]),
}
_TIER_COUNTERS: dict[str, tuple[str, Callable[[TierStats], float]]] = {
    "hits": ("Blocks delivered, verified.", lambda tier: tier.hits),
    "verify_failures": ("Loads whose bytes or header were not what was asked for.", lambda tier: tier.verify_failures),
    "stores": ("Blocks taken in.", lambda tier: tier.stores),
    "evictions": ("Blocks evicted.", lambda tier: tier.evictions),
    "foreign_evictions": ("Blocks of another identity evicted.", lambda tier: tier.foreign_evictions),
    "loaded_bytes": ("Bytes delivered.", lambda tier: tier.loaded_bytes),
    "stored_bytes": ("Bytes taken in, in the tier's form.", lambda tier: tier.stored_bytes),
    "breaker_trips": ("Times the breaker opened.", lambda tier: tier.breaker_trips),
}


class StoreCollector(Collector):
    """Register with a `prometheus_client` registry: ``REGISTRY.register(StoreCollector(store.stats))``."""

    def __init__(self, stats: Callable[[], StoreStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """All metrics, under ``spillway_kv_``."""
        stats = self._stats()
        yield _by_label(
            "prefetches", "Blocks asked for ahead of need, by what came of them.", "outcome", stats.prefetches
        )
        yield _by_label("served", "What the block server did for peers.", "outcome", stats.served)
        for name, text, value in (
            ("puts", "Blocks put.", stats.puts),
            ("put_drops", "Blocks put and not taken.", stats.put_drops),
            ("gets", "Blocks asked for.", stats.gets),
            ("recomputes_avoided", "Blocks that some tier delivered.", stats.hits),
            ("misses", "Blocks that no tier delivered.", stats.misses),
            ("spared", "Blocks that left the device without a copy: nobody will read them again.", stats.spared),
            ("prefetch_hits", "Blocks fetched ahead of need and then delivered.", stats.prefetch_hits),
            ("late_loads", "Planned blocks that came from below host memory while a line waited.", stats.late_loads),
        ):
            yield CounterMetricFamily(f"spillway_kv_{name}", text, value=value)
        yield GaugeMetricFamily("spillway_kv_queued_writes", "Blocks on their way to disk.", value=stats.queued_writes)
        yield GaugeMetricFamily("spillway_kv_queued_reads", "Loads no thread has taken yet.", value=stats.queued_reads)
        yield from self._tiers(stats.tiers)
        if stats.index is not None:
            yield from _index(stats.index)

    def _tiers(self, tiers: dict[str, TierStats]) -> Iterator[Metric]:
        for family_of, table in ((GaugeMetricFamily, _TIER_GAUGES), (CounterMetricFamily, _TIER_COUNTERS)):
            for name, (text, value) in table.items():
                family = family_of(f"spillway_kv_tier_{name}", text, labels=["tier"])
                for tier, figures in tiers.items():
                    family.add_metric([tier], value(figures))
                yield family
        misses = CounterMetricFamily("spillway_kv_tier_misses", "Blocks not delivered.", labels=["tier", "reason"])
        drops = CounterMetricFamily("spillway_kv_tier_drops", "Blocks not taken in.", labels=["tier", "reason"])
        load = HistogramMetricFamily("spillway_kv_tier_load_seconds", "Time to load one block.", labels=["tier"])
        store = HistogramMetricFamily("spillway_kv_tier_store_seconds", "Time to store one block.", labels=["tier"])
        for tier, figures in tiers.items():
            for counted, family in ((figures.misses, misses), (figures.drops, drops)):
                for reason, count in counted.items():
                    family.add_metric([tier, reason], count)
            for latencies, histogram in ((figures.load_latency, load), (figures.store_latency, store)):
                histogram.add_metric([tier], _buckets(latencies), sum_value=latencies.total_s)
        yield from (misses, drops, load, store)


def _index(index: IndexStats) -> Iterator[Metric]:
    """Of the index that nodes share."""
    yield _by_label("index_calls", "Calls to Redis, by outcome.", "outcome", index.calls)
    yield _by_label("index_near", "Blocks looked up, by whether a recent answer served.", "outcome", index.near)
    yield _by_label("index_changes", "What became of changes, and of entries of the dead.", "outcome", index.writer)
    for name, text, value in (
        ("queued_changes", "Blocks whose entry in Redis may differ from what is here.", index.queued_changes),
        ("generation", "Of this node's lease; 0 before it had one.", index.generation),
        ("lease_held", "Whether this node holds its lease, as far as it knows.", index.held),
        ("breaker_state", "0 closed, 1 probing, 2 open.", _BREAKER[index.breaker]),
    ):
        yield GaugeMetricFamily(f"spillway_kv_index_{name}", text, value=value)
    yield CounterMetricFamily("spillway_kv_index_breaker_trips", "Times it opened.", value=index.breaker_trips)


def _by_label(name: str, text: str, label: str, values: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"spillway_kv_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _buckets(latencies: Latencies) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound in seconds."""
    total = 0
    buckets = []
    for power, count in enumerate(latencies.counts[:-1]):
        total += count
        buckets.append((repr((1 << power) * 1e-6), float(total)))
    return [*buckets, ("+Inf", float(latencies.operations))]
