"""What Prometheus sees is what the store counted."""

from pathlib import Path

import pytest
from kv_factories import blank, content, name, store_config

from spillway.kvstore import BlockStore, Faults

prometheus_client = pytest.importorskip("prometheus_client")


def test_every_figure_is_exposed(tmp_path: Path) -> None:
    from spillway.kvstore.metrics import StoreCollector

    faults = Faults(seed=2, bit_flip=1.0)
    config = store_config(tmp_path, host=4, disk=20, disk_faults=faults)
    with BlockStore.open(config) as store:
        registry = prometheus_client.CollectorRegistry()
        registry.register(StoreCollector(store.stats))
        store.put_many([(name(number), content(number)) for number in range(10)])
        assert store.flush()
        found = store.get_many([(name(number), blank()) for number in range(10)])
        stats = store.stats()
        host, disk = stats.tiers["host"], stats.tiers["disk"]

        def value(metric: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"spillway_kv_{metric}", labels)

        assert value("puts_total") == 10
        assert value("gets_total") == 10
        assert value("recomputes_avoided_total") == found.count(True) == host.hits
        assert value("misses_total") == found.count(False) == 10 - host.hits > 0
        assert value("tier_misses_total", tier="disk", reason="checksum") == disk.misses["checksum"]
        assert value("tier_verify_failures_total", tier="disk") == disk.verify_failures == disk.misses["checksum"]
        assert value("tier_blocks", tier="host") == host.blocks
        assert value("tier_bytes", tier="disk") == disk.bytes
        assert value("tier_budget_bytes", tier="disk") == disk.budget_bytes
        assert value("tier_breaker_state", tier="disk") == 0
        assert value("tier_load_seconds_count", tier="host") == host.hits
        assert value("tier_load_seconds_sum", tier="host") == pytest.approx(host.load_latency.total_s)
        assert value("tier_store_seconds_bucket", tier="disk", le="+Inf") == disk.stores


def test_a_quantile_is_right_to_a_factor_of_two() -> None:
    from spillway.kvstore.stats import TierCounters

    counters = TierCounters()
    for microseconds in (100, 100, 100, 5000):
        counters.hit(10, microseconds * 1e-6)
    loads, stores = counters.latencies()
    assert 100e-6 <= loads.quantile_s(0.5) <= 200e-6
    assert 5000e-6 <= loads.quantile_s(1.0) <= 10000e-6
    assert stores.quantile_s(0.5) == 0.0
