"""Deadlines, priorities, back-pressure and the breaker: what the store does when a tier is slow, stuck or broken."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kv_factories import BLOCK_BYTES, IDENTITY, blank, content, header_of, host_bytes, name, store_config

from spillway.kvstore import BlockStore, Deadlines, Faults
from spillway.kvstore.buffers import Bytes
from spillway.kvstore.eviction.lru import LRU
from spillway.kvstore.header import BlockHeader
from spillway.kvstore.identity import BlockHash
from spillway.kvstore.index.memory import MemoryIndex
from spillway.kvstore.outcomes import MissReason, StoreOutcome
from spillway.kvstore.sealing import Sealer
from spillway.kvstore.tiers.base import TierIndex
from spillway.kvstore.tiers.host import HostTier
from spillway.kvstore.tiers.slab import Slab
from spillway.kvstore.transfer.breaker import Breaker, BreakerState
from spillway.kvstore.transfer.lane import Lane
from spillway.kvstore.transfer.reads import Priority, ReadQueue, ReadRequest

SOON_S = 30.0
"""Long enough for anything that is going to happen at all."""


class GatedTier(HostTier):
    """A tier whose loads and stores wait for a gate, and which remembers their order."""

    def __init__(self, name: str = "gated") -> None:
        door = TierIndex(MemoryIndex(), name)
        super().__init__(name, Slab(BLOCK_BYTES, host_bytes(64)), LRU(), door, lambda block: True)
        self.gate = threading.Event()
        self.started: list[BlockHash] = []
        self.began = threading.Semaphore(0)

    def load(self, block: BlockHash, out: Bytes) -> BlockHeader | MissReason:
        self.started.append(block)
        self.began.release()
        assert self.gate.wait(SOON_S)
        return super().load(block, out)


@pytest.mark.parametrize("blocks", [16, 256])
def test_a_full_tier_whose_cold_blocks_must_wait_is_not_searched(blocks: int) -> None:
    """A disk slower than its puts must not make each of them cost as much as host memory has blocks."""
    asked: list[BlockHash] = []
    pinned = {name(0)}

    def written(block: BlockHash) -> bool:
        asked.append(block)
        return False

    tier = HostTier("host", Slab(BLOCK_BYTES, host_bytes(blocks)), LRU(), TierIndex(MemoryIndex(), "host"), written)
    for number in range(blocks):
        assert tier.store(header_of(number, content(number)), content(number)) is StoreOutcome.STORED
    with tier.pinned(*pinned, touch=False):
        assert tier.store(header_of(blocks, content(blocks)), content(blocks)) is StoreOutcome.FULL
    assert 0 < len(asked) < 8
    assert not pinned.intersection(asked)
    tier.close()


@pytest.fixture
def gated() -> Iterator[GatedTier]:
    tier = GatedTier()
    for number in range(20):
        tier.store(header_of(number, content(number)), content(number))
    yield tier
    tier.gate.set()


@pytest.fixture
def queue(gated: GatedTier) -> Iterator[ReadQueue]:
    made = ReadQueue(Lane(gated, Sealer(IDENTITY.digest(), BLOCK_BYTES)), threads=1)
    yield made
    gated.gate.set()
    assert made.close(SOON_S)


class Ends:
    """Requests whose ends are recorded."""

    def __init__(self) -> None:
        self.results: dict[int, MissReason | None] = {}
        self.delivered: dict[int, Bytes] = {}
        self._changed = threading.Condition()

    def request(self, number: int) -> ReadRequest:
        def deliver(header: BlockHeader, stored: Bytes) -> None:
            self.delivered[number] = stored[: header.stored_bytes].copy()

        def ended(result: MissReason | None, seconds: float) -> None:
            with self._changed:
                self.results[number] = result
                self._changed.notify_all()

        return ReadRequest(name(number), deliver, ended)

    def wait(self, count: int) -> dict[int, MissReason | None]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.results) == count, SOON_S)
        return self.results


def soon() -> float:
    return time.monotonic() + SOON_S


class TestReadQueue:
    def test_loads_go_before_prefetches_that_came_earlier(self, gated: GatedTier, queue: ReadQueue) -> None:
        ends = Ends()
        queue.submit([ends.request(0)], Priority.PREFETCH, soon())
        assert gated.began.acquire(timeout=SOON_S), "the first is under way, the rest queue up behind it"
        queue.submit([ends.request(1), ends.request(2)], Priority.PREFETCH, soon())
        batch = queue.submit([ends.request(3), ends.request(4)], Priority.LOAD, soon())
        assert (queue.queued, queue.urgent) == (4, 2)
        gated.gate.set()
        assert batch.wait() == [None, None]
        ends.wait(5)
        assert gated.started == [name(number) for number in (0, 3, 4, 1, 2)]
        assert all(np.array_equal(data, content(number)) for number, data in ends.delivered.items())

    def test_a_late_read_delivers_nothing(self, gated: GatedTier, queue: ReadQueue) -> None:
        ends = Ends()
        batch = queue.submit([ends.request(0), ends.request(1)], Priority.LOAD, time.monotonic() + 0.05)
        assert batch.wait() == [MissReason.DEADLINE, MissReason.DEADLINE]
        gated.gate.set()
        assert ends.wait(2) == {0: MissReason.CANCELLED, 1: MissReason.CANCELLED}
        assert ends.delivered == {}
        assert gated.started == [name(0)], "the second was not begun, as nobody wanted it any more"

    def test_a_cancelled_batch_is_not_begun(self, gated: GatedTier, queue: ReadQueue) -> None:
        ends = Ends()
        queue.submit([ends.request(0)], Priority.PREFETCH, soon())
        assert gated.began.acquire(timeout=SOON_S)
        batch = queue.submit([ends.request(1), ends.request(2)], Priority.PREFETCH, soon())
        batch.cancel()
        gated.gate.set()
        assert ends.wait(3) == {0: None, 1: MissReason.CANCELLED, 2: MissReason.CANCELLED}
        assert gated.started == [name(0)]

    def test_a_prefetch_that_cannot_come_in_time_is_not_begun(self, gated: GatedTier, queue: ReadQueue) -> None:
        ends = Ends()
        queue.submit([ends.request(0)], Priority.PREFETCH, soon())
        assert gated.began.acquire(timeout=SOON_S)
        queue.submit([ends.request(1)], Priority.PREFETCH, time.monotonic())
        gated.gate.set()
        assert ends.wait(2) == {0: None, 1: MissReason.DEADLINE}
        assert gated.started == [name(0)]

    def test_closing_ends_what_is_queued(self, gated: GatedTier, queue: ReadQueue) -> None:
        ends = Ends()
        first = queue.submit([ends.request(0)], Priority.LOAD, soon())
        assert gated.began.acquire(timeout=SOON_S)
        batch = queue.submit([ends.request(1)], Priority.LOAD, soon())
        closer = threading.Thread(target=queue.close, args=(SOON_S,))
        closer.start()
        assert batch.wait() == [MissReason.CANCELLED]
        gated.gate.set()
        assert first.wait() == [None]
        closer.join()

    def test_a_defect_costs_one_block_and_not_the_thread(self, gated: GatedTier, queue: ReadQueue) -> None:
        def defective(header: BlockHeader, stored: Bytes) -> None:
            raise RuntimeError("a defect")

        ends = Ends()
        gated.gate.set()
        bad = ReadRequest(name(0), defective, lambda result, seconds: None)
        assert queue.submit([bad], Priority.LOAD, soon()).wait() == [MissReason.INTERNAL]
        assert queue.submit([ends.request(1)], Priority.LOAD, soon()).wait() == [None]

    def test_a_damaged_block_is_withdrawn(self, gated: GatedTier, queue: ReadQueue) -> None:
        gated.gate.set()
        with gated.pinned(name(0)) as held:
            assert held is not None
            held.padded[100] ^= 1
        ends = Ends()
        assert queue.submit([ends.request(0)], Priority.LOAD, soon()).wait() == [MissReason.CHECKSUM]
        assert not gated.contains(name(0))
        assert queue.lane.counters.verify_failures == 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestBreaker:
    def make(self) -> tuple[Breaker, Clock]:
        clock = Clock()
        return Breaker(threshold=3, first_pause_s=1.0, longest_pause_s=4.0, clock=clock), clock

    def open(self, breaker: Breaker) -> None:
        for _ in range(3):
            assert breaker.allow()
            breaker.failure()

    def test_opens_after_failures_in_a_row_only(self) -> None:
        breaker, _ = self.make()
        for _ in range(5):
            breaker.failure()
            breaker.failure()
            breaker.success()
        assert (breaker.state, breaker.trips) == (BreakerState.CLOSED, 0)
        self.open(breaker)
        assert (breaker.state, breaker.trips) == (BreakerState.OPEN, 1)
        assert not breaker.available
        assert not breaker.allow()

    def test_one_probe_decides(self) -> None:
        breaker, clock = self.make()
        self.open(breaker)
        clock.now = 1.0
        assert breaker.available
        assert breaker.allow()
        assert breaker.state is BreakerState.PROBING
        assert not breaker.available
        assert not breaker.allow(), "one request probes, the others wait for its outcome"
        breaker.success()
        assert breaker.state is BreakerState.CLOSED
        assert breaker.allow()

    def test_the_pause_doubles_up_to_a_limit(self) -> None:
        breaker, clock = self.make()
        self.open(breaker)
        pauses = []
        for _ in range(4):
            start = clock.now
            while not breaker.allow():
                clock.now += 0.5
            pauses.append(clock.now - start)
            breaker.failure()
        assert pauses == [1.0, 2.0, 4.0, 4.0]

    def test_a_probe_that_never_reports_is_replaced(self) -> None:
        breaker, clock = self.make()
        self.open(breaker)
        clock.now = 1.0
        assert breaker.allow()
        clock.now = 1.9
        assert not breaker.allow()
        clock.now = 2.0
        assert breaker.available
        assert breaker.allow()


def put(store: BlockStore, *numbers: int) -> list[bool]:
    return store.put_many([(name(number), content(number)) for number in numbers])


def disk_faults(store: BlockStore) -> Callable[[], None]:
    tier = store._parts.readers[0].lane.tier
    return tier.heal


class TestStoreInTrouble:
    """A stuck or broken disk behind the whole store."""

    def test_a_stuck_disk_costs_a_deadline_then_nothing(self, tmp_path: Path) -> None:
        config = store_config(tmp_path, disk=20, read_threads=2)
        with BlockStore.open(config) as store:
            put(store, *range(8))
        stuck = store_config(
            tmp_path,
            disk=20,
            disk_faults=Faults(stuck=1.0, stuck_s=SOON_S),
            deadlines=Deadlines(load_s=0.05, put_s=0.05),
            read_threads=2,
        )
        with BlockStore.open(stuck) as store:
            out = blank()
            for number in range(3):
                assert store.get_many([(name(number), out)]) == [False]
            disk = store.stats().tiers["disk"]
            assert (disk.breaker, disk.breaker_trips) == ("open", 1)
            assert disk.misses == {"deadline": 3}
            assert store.match([name(5)]) == 0, "what cannot be loaded is not promised"
            assert store.get_many([(name(5), out)]) == [False]
            assert store.stats().tiers["disk"].misses["breaker"] == 1
            assert (out == 0xEE).all()
            disk_faults(store)()
            until = soon()
            while store.match([name(5)]) == 0 and time.monotonic() < until:
                time.sleep(0.01)
            assert store.get_many([(name(5), out)]) == [True], "the probe succeeded"
            assert store.stats().tiers["disk"].breaker == "closed"
            assert np.array_equal(out, content(5))

    def test_a_late_read_never_writes_into_the_callers_buffer(self, tmp_path: Path) -> None:
        with BlockStore.open(store_config(tmp_path, disk=20)) as store:
            put(store, *range(4))
        slow = store_config(
            tmp_path, disk=20, disk_faults=Faults(delay=1.0, delay_s=0.3), deadlines=Deadlines(load_s=0.02)
        )
        with BlockStore.open(slow) as store:
            outs = [blank() for _ in range(4)]
            found = store.get_many([(name(number), out) for number, out in enumerate(outs)])
            assert found == [False] * 4
            until = soon()
            while store._parts.readers[0].urgent and time.monotonic() < until:
                time.sleep(0.01)
            assert store._parts.readers[0].urgent == 0, "the reads have ended"
            assert all((out == 0xEE).all() for out in outs)

    def test_staging_that_stays_full_drops_what_comes_and_counts_it(self, tmp_path: Path) -> None:
        config = store_config(
            tmp_path,
            disk=40,
            staging_bytes=host_bytes(4),
            disk_faults=Faults(stuck=1.0, stuck_s=SOON_S),
            deadlines=Deadlines(put_s=0.05),
        )
        with BlockStore.open(config) as store:
            kept = put(store, *range(10))
            assert kept.count(True) == 4
            assert store.stats().put_drops == 6
            assert store.stats().tiers["staging"].drops == {"full": 6}
            store.check()
            disk_faults(store)()

    def test_a_host_tier_goes_on_without_its_disk(self, tmp_path: Path) -> None:
        """Broken writes trip the breaker; then host memory evicts as if there were no disk."""
        config = store_config(tmp_path, host=8, disk=40, disk_faults=Faults(io_error=1.0))
        with BlockStore.open(config) as store:
            for number in range(60):
                assert put(store, number) == [True]
                out = blank()
                assert store.get_many([(name(number), out)]) == [True]
                assert np.array_equal(out, content(number))
            disk = store.stats().tiers["disk"]
            assert disk.breaker_trips >= 1
            assert disk.drops["io_error"] >= 3
            store.check()

    def test_a_slow_disk_makes_the_host_tier_give_up_the_coldest(self, tmp_path: Path) -> None:
        config = store_config(
            tmp_path,
            host=20,
            disk=60,
            disk_faults=Faults(stuck=1.0, stuck_s=SOON_S),
            deadlines=Deadlines(put_s=0.05),
            write_threads=1,
        )
        with BlockStore.open(config) as store:
            for number in range(40):
                assert put(store, number) == [True]
            assert store.contains(name(39))
            disk = store.stats().tiers["disk"]
            assert disk.drops["write_behind"] >= 20 - 8
            assert disk.stores == 0
            store.check()
            disk_faults(store)()

    def test_writing_waits_for_urgent_loads(self, tmp_path: Path) -> None:
        """With a load under way, a write-behind begins only after a short wait; it is not starved."""
        config = store_config(tmp_path, disk=20)
        with BlockStore.open(config) as store:
            put(store, *range(4))
            assert store.flush()
            stop = threading.Event()

            def load() -> None:
                out = blank()
                while not stop.is_set():
                    store.get_many([(name(0), out)])

            loader = threading.Thread(target=load)
            loader.start()
            put(store, *range(4, 12))
            assert store.flush()
            stop.set()
            loader.join()
            assert store.stats().tiers["disk"].blocks == 12


def test_outcomes_are_drops_or_held() -> None:
    assert [outcome for outcome in StoreOutcome if outcome.held] == [StoreOutcome.STORED, StoreOutcome.PRESENT]
    assert {outcome for outcome in StoreOutcome if outcome.trouble} == {
        StoreOutcome.SHORT_WRITE,
        StoreOutcome.IO_ERROR,
    }
