"""The store as its caller sees it."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kv_factories import BLOCK_BYTES, IDENTITY, OTHER_IDENTITY, blank, content, disk_bytes, name, store_config

from spillway.kvstore import BlockBufferError, BlockStore, Codecs, ConfigError, StoreClosedError, StoreConfig

KINDS = {"host": {"host": 12}, "disk": {"disk": 12}, "host-and-disk": {"host": 4, "disk": 12}}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path):
    with BlockStore.open(store_config(tmp_path, **KINDS[request.param])) as opened:
        yield opened
        opened.check()


def put(store: BlockStore, *numbers: int) -> list[bool]:
    return store.put_many([(name(number), content(number)) for number in numbers])


def get(store: BlockStore, *numbers: int) -> list[bool]:
    """Load blocks; every one that is delivered must be right."""
    outs = [blank() for _ in numbers]
    found = store.get_many([(name(number), out) for number, out in zip(numbers, outs, strict=True)])
    for number, out, hit in zip(numbers, outs, found, strict=True):
        assert not hit or np.array_equal(out, content(number)), f"wrong bytes for block {number}"
    return found


def test_blocks_come_back_as_they_were_put(store: BlockStore) -> None:
    assert put(store, *range(8)) == [True] * 8
    assert get(store, *range(8)) == [True] * 8


def test_a_buffer_may_be_reused_as_soon_as_put_returns(store: BlockStore) -> None:
    buffer = blank()
    for number in range(8):
        buffer[:] = content(number)
        assert store.put_many([(name(number), buffer)]) == [True]
    assert get(store, *range(8)) == [True] * 8


def test_a_put_block_is_found_at_once(store: BlockStore) -> None:
    for number in range(8):
        put(store, number)
        assert store.contains(name(number))
        assert get(store, number) == [True]


def test_what_was_never_put_is_a_miss(store: BlockStore) -> None:
    put(store, 1)
    assert get(store, 0, 1, 2) == [False, True, False]
    assert not store.contains(name(0))


def test_match_counts_the_leading_blocks(store: BlockStore) -> None:
    put(store, 0, 1, 2, 4)
    names = [name(number) for number in range(6)]
    assert store.match(names) == 3
    assert store.match(names[3:]) == 0
    assert store.match([]) == 0


def test_a_full_store_keeps_a_prefix_rather_than_its_end(tmp_path: Path) -> None:
    """Blocks put together are a chain: when not all fit, the first are worth more."""
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        put(store, *range(6))
        assert store.match([name(number) for number in range(6)]) == 4


def test_any_contiguous_buffer_will_do(store: BlockStore) -> None:
    floats = content(1).view(np.float32).reshape(2, 2, -1)
    assert store.put_many([(name(1), floats), (name(2), bytes(content(2))), (name(3), memoryview(content(3)))])
    out = bytearray(BLOCK_BYTES)
    assert store.get_many([(name(2), out)]) == [True]
    assert bytes(out) == content(2).tobytes()
    array = np.zeros((2, BLOCK_BYTES // 8), np.float32)
    assert store.get_many([(name(1), array)]) == [True]
    assert array.tobytes() == content(1).tobytes()


@pytest.mark.parametrize(
    "buffer", [np.zeros(BLOCK_BYTES - 1, np.uint8), np.zeros(2 * BLOCK_BYTES, np.uint8)[::2], "text", 7]
)
def test_an_unfit_buffer_is_the_callers_error(store: BlockStore, buffer: object) -> None:
    with pytest.raises(BlockBufferError):
        store.put_many([(name(1), buffer)])
    with pytest.raises(BlockBufferError):
        store.get_many([(name(1), buffer)])
    with pytest.raises(BlockBufferError, match="read-only"):
        store.get_many([(name(1), bytes(BLOCK_BYTES))])


def test_a_closed_store_says_so(store: BlockStore) -> None:
    store.close()
    store.close()
    for use in (lambda: put(store, 1), lambda: get(store, 1), lambda: store.match([]), store.flush):
        with pytest.raises(StoreClosedError):
            use()
    with BlockStore.open(replace(store.config, host_bytes=1 << 20, disk_bytes=0, disk_dir=None)) as other:
        other.check()


def test_figures_add_up(store: BlockStore) -> None:
    put(store, *range(6))
    get(store, *range(8))
    stats = store.stats()
    assert (stats.puts, stats.put_drops, stats.gets, stats.hits, stats.misses) == (6, 0, 8, 6, 2)
    assert sum(tier.hits for tier in stats.tiers.values()) == 6
    first = next(iter(stats.tiers.values()))
    assert first.stores >= 6
    assert first.store_latency.operations == first.stores
    assert first.load_latency.operations == first.hits
    for tier in stats.tiers.values():
        assert tier.bytes <= tier.budget_bytes
        assert (tier.breaker, tier.verify_failures) == ("closed", 0)
        assert set(tier.misses) <= {"absent"}


def test_many_threads_may_use_it_at_once(store: BlockStore) -> None:
    failures: list[Exception] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(40):
                chosen = [int(number) for number in rng.integers(0, 20, 3)]
                (put if rng.random() < 0.5 else get)(store, *chosen)
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class TestDemotion:
    """Host memory that overflows to disk."""

    def test_what_leaves_host_memory_is_on_disk(self, tmp_path: Path) -> None:
        with BlockStore.open(store_config(tmp_path, host=4, disk=40)) as store:
            for number in range(30):
                assert put(store, number) == [True]
            assert get(store, *range(30)) == [True] * 30
            stats = store.stats()
            assert stats.tiers["host"].evictions >= 26
            assert stats.tiers["disk"].drops == {}
            store.check()

    def test_a_loaded_block_is_promoted_to_host_memory(self, tmp_path: Path) -> None:
        with BlockStore.open(store_config(tmp_path, host=4, disk=20)) as store:
            put(store, *range(12))
            assert store.flush()
            cold = next(number for number in range(12) if [p.tier for p in store.locate(name(number))] == ["disk"])
            get(store, cold)
            assert [place.tier for place in store.locate(name(cold))] == ["host", "disk"]

    def test_prefetch_brings_blocks_to_host_memory(self, tmp_path: Path) -> None:
        with BlockStore.open(store_config(tmp_path, host=8, disk=40)) as store:
            put(store, *range(30))
            assert store.flush()
            cold = [number for number in range(30) if len(store.locate(name(number))) == 1][:2]
            store.prefetch([name(number) for number in cold])
            done = threading.Event()
            for _ in range(1000):
                if store.stats().prefetches.get("fetched") == 2 or done.wait(0.01):
                    break
            assert store.stats().prefetches == {"fetched": 2}
            assert all(len(store.locate(name(number))) == 2 for number in cold)

    def test_nothing_is_written_while_host_memory_has_room(self, tmp_path: Path) -> None:
        with BlockStore.open(store_config(tmp_path, host=40, disk=40)) as store:
            put(store, *range(20))
            assert store.stats().tiers["disk"].stores == 0
            assert store.stats().queued_writes == 0

    def test_flush_leaves_every_block_on_disk(self, tmp_path: Path) -> None:
        with BlockStore.open(store_config(tmp_path, host=20, disk=40)) as store:
            put(store, *range(20))
            assert store.flush()
            assert all("disk" in [p.tier for p in store.locate(name(number))] for number in range(20))


class TestRestart:
    """The disk tier outlives the process."""

    @pytest.mark.parametrize("host", [0, 6, 30])
    def test_a_closed_store_opens_warm(self, tmp_path: Path, host: int) -> None:
        config = store_config(tmp_path, host=host, disk=30)
        with BlockStore.open(config) as store:
            put(store, *range(20))
        with BlockStore.open(config) as store:
            assert store.match([name(number) for number in range(20)]) == 20
            assert get(store, *range(20)) == [True] * 20
            store.check()

    def test_blocks_of_another_model_are_never_served_and_leave_first(self, tmp_path: Path) -> None:
        config = store_config(tmp_path, disk=10)
        with BlockStore.open(config) as store:
            put(store, *range(8))
        with BlockStore.open(replace(config, identity=OTHER_IDENTITY)) as store:
            assert store.match([name(0)]) == 0
            assert get(store, *range(8)) == [False] * 8
            foreign = store.stats().tiers["disk"].foreign_blocks
            assert foreign == 8
            others = [name(number, OTHER_IDENTITY) for number in range(6)]
            store.put_many([(block, content(100 + number)) for number, block in enumerate(others)])
            assert store.flush()
            disk = store.stats().tiers["disk"]
            assert (disk.evictions, disk.foreign_blocks + disk.foreign_evictions) == (0, 8)
            assert store.match(others) == 6
            store.check()

    def test_what_another_model_left_is_there_when_the_first_comes_back(self, tmp_path: Path) -> None:
        config = store_config(tmp_path, disk=20)
        with BlockStore.open(config) as store:
            put(store, *range(8))
        with BlockStore.open(replace(config, identity=OTHER_IDENTITY)) as store:
            store.put_many([(name(1, OTHER_IDENTITY), content(101))])
        with BlockStore.open(config) as store:
            assert get(store, *range(8)) == [True] * 8
            assert store.stats().tiers["disk"].foreign_blocks == 1


@pytest.mark.parametrize(
    "change",
    [
        {"block_bytes": 0},
        {"host_bytes": -1},
        {"disk_bytes": 1 << 20},
        {"disk_dir": Path("somewhere")},
        {"host_bytes": 0},
        {"disk_sharers": 0},
        {"read_threads": 0},
        {"eviction": "fifo"},
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, object]) -> None:
    sound = StoreConfig(BLOCK_BYTES, IDENTITY, host_bytes=1 << 20)
    with pytest.raises(ConfigError):
        replace(sound, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"host_bytes": 100},
        {"host_bytes": 0, "disk_bytes": 1000, "disk_dir": Path("somewhere")},
        {"host_bytes": 0, "disk_bytes": disk_bytes(8), "disk_dir": Path("somewhere"), "staging_bytes": 100},
        {"codecs": Codecs(host="int3", block_shape=(2, 2, 2, 16, 16))},
        {"codecs": Codecs(host="int8", block_shape=(2, 2, 2, 16, 8))},
    ],
)
def test_budgets_and_codecs_that_hold_no_block_are_refused(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        BlockStore.open(replace(StoreConfig(BLOCK_BYTES, IDENTITY, host_bytes=1 << 20), **change))
    assert not list(tmp_path.rglob("segment-*"))
