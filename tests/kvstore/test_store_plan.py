"""A store that follows a job's plan: what it keeps, what it writes, what it brings ahead of need."""

import time
from pathlib import Path

import numpy as np
from kv_factories import blank, content, name, store_config

from spillway.kvstore import BlockStore, JobPlan


def put(store: BlockStore, *numbers: int) -> None:
    assert all(store.put_many([(name(number), content(number)) for number in numbers]))


def get(store: BlockStore, *numbers: int) -> list[bool]:
    outs = [blank() for _ in numbers]
    found = store.get_many([(name(number), out) for number, out in zip(numbers, outs, strict=True)])
    for number, out, hit in zip(numbers, outs, found, strict=True):
        assert not hit or np.array_equal(out, content(number))
    return found


def plan(*lines: tuple[int, ...]) -> JobPlan:
    return JobPlan([[name(number) for number in line] for line in lines])


def settled(store: BlockStore, ended: int) -> dict[str, int]:
    """The prefetch figures once so many blocks have ended."""
    until = time.monotonic() + 30
    while sum(store.stats().prefetches.values()) < ended and time.monotonic() < until:
        time.sleep(0.005)
    return store.stats().prefetches


def test_a_full_host_tier_keeps_what_is_needed_soonest(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        store.follow(plan((0,), (1,), (2,), (3,), (4,), (5,), (0,), (1,), (2,)))
        for line in range(6):
            put(store, line)
            store.advance(line + 1)
        assert [store.contains(name(number)) for number in range(6)] == [True, True, True, False, False, True]
        assert get(store, 0, 1, 2) == [True] * 3


def test_what_no_line_needs_any_more_is_not_written_to_disk(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=20, disk=40)) as store:
        store.follow(plan((0, 1), (0, 2), (0, 3), (0, 4)))
        put(store, 0, 1, 2, 9)
        store.advance(3)
        assert store.flush()
        assert {n for n in (0, 1, 2, 9) if "disk" in [p.tier for p in store.locate(name(n))]} == {0, 9}


def test_closing_writes_only_what_may_be_needed(tmp_path: Path) -> None:
    config = store_config(tmp_path, host=20, disk=40)
    with BlockStore.open(config) as store:
        store.follow(plan((0, 1), (0, 2)))
        put(store, 0, 1, 2)
        store.advance(1)
    with BlockStore.open(config) as store:
        assert [store.contains(name(number)) for number in (0, 1, 2)] == [True, False, True]


def test_an_expected_block_survives_what_the_plan_says(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        store.follow(plan((0, 1), (2, 3), (4, 5), (2, 3)))
        store.advance(1)
        store.expect([name(0)])
        put(store, 0, 1)
        put(store, 2, 3)
        put(store, 4)
        assert store.contains(name(0))
        assert not store.contains(name(1))
        assert get(store, 0) == [True]
        put(store, 5)
        assert not store.contains(name(0)), "it was loaded, and is not needed again"


def test_blocks_are_fetched_ahead_of_their_line(tmp_path: Path) -> None:
    config = store_config(tmp_path, host=0, disk=40)
    with BlockStore.open(config) as store:
        put(store, *range(12))
    with BlockStore.open(store_config(tmp_path, host=12, disk=40)) as store:
        store.follow(plan((0, 1), (0, 2), (0, 3)))
        assert settled(store, 3)["fetched"] == 3, "a quarter of the host tier is promised at once"
        store.advance(1)
        assert settled(store, 4) == {"fetched": 4}
        assert get(store, 0, 1, 2, 3) == [True] * 4
        assert store.stats().tiers["disk"].hits == 0


def test_a_prefetch_displaces_nothing_that_is_needed_sooner(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=0, disk=40)) as store:
        put(store, *range(12))
    with BlockStore.open(store_config(tmp_path, host=4, disk=40)) as store:
        store.follow(None)
        assert get(store, 0, 1, 2, 3) == [True] * 4, "promoted, so the host tier is full"
        store.follow(plan((0, 1, 2, 3), (8,)))
        settled(store, 1)
        assert all(len(store.locate(name(number))) == 2 for number in range(4))
        assert len(store.locate(name(8))) == 1
        assert store.stats().prefetches.get("no_room") == 1


def test_without_a_plan_it_goes_by_recency(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        store.follow(plan((0,), (1,), (0,)))
        put(store, 0)
        store.follow(None)
        for number in range(1, 5):
            put(store, number)
        assert not store.contains(name(0))
        store.advance(3)
        store.check()


def test_what_the_device_gives_back_is_not_refused_for_its_own_copies(tmp_path: Path) -> None:
    """Copies of what the device had leave for what is needed later, but not once the device has given them back."""
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        store.follow(plan((0, 1), (2, 3), (4,), (0, 1), (2, 3)))
        put(store, 0, 1, 2, 3)
        assert get(store, 0, 1, 2, 3) == [True] * 4
        put(store, 4)
        put(store, 0, 1)
        assert [store.contains(name(number)) for number in (0, 1, 4)] == [True] * 3
