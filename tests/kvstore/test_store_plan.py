"""A store that follows a job's plan: what it keeps, what it writes, what it brings ahead of need."""

import time
from pathlib import Path

import numpy as np
from kv_factories import blank, content, name, store_config

from spillway.kvstore import BlockStore, Deadlines, Faults, JobPlan


def put(store: BlockStore, *numbers: int) -> None:
    assert all(store.put_many([(name(number), content(number)) for number in numbers]))


def get(store: BlockStore, *numbers: int) -> list[bool]:
    outs = [blank() for _ in numbers]
    found = store.get_many([(name(number), out) for number, out in zip(numbers, outs, strict=True)])
    for number, out, hit in zip(numbers, outs, found, strict=True):
        assert not hit or np.array_equal(out, content(number))
    return found


def plan(*lines: tuple[int, ...], whole: bool = False) -> JobPlan:
    return JobPlan([[name(number) for number in line] for line in lines], whole=whole)


def settled(store: BlockStore, ended: int) -> dict[str, int]:
    """The prefetch figures once so many blocks have ended."""
    until = time.monotonic() + 30
    while sum(store.stats().prefetches.values()) < ended and time.monotonic() < until:
        time.sleep(0.005)
    return store.stats().prefetches


def on_disk(store: BlockStore, numbers: range) -> set[int]:
    return {number for number in numbers if "disk" in [place.tier for place in store.locate(name(number))]}


def test_a_full_host_tier_keeps_what_is_needed_soonest(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        following = store.follow(plan((0,), (1,), (2,), (3,), (4,), (5,), (0,), (1,), (2,), whole=True))
        for line in range(6):
            following.advance(line + 1)
            store.put_many([(name(line), content(line))])
        assert [store.contains(name(number)) for number in range(6)] == [True, True, True, True, False, False]
        assert get(store, 0, 1, 2) == [True] * 3


def test_what_nobody_needs_any_more_is_not_written_to_disk(tmp_path: Path) -> None:
    for whole, expected in ((True, {0}), (False, {0, 1, 2, 9})):
        with BlockStore.open(store_config(tmp_path / str(whole), host=20, disk=40)) as store:
            following = store.follow(plan((0, 1), (0, 2), (0, 3), (0, 4), whole=whole))
            put(store, 0, 1, 2, 9)
            following.advance(3)
            assert store.flush()
            assert on_disk(store, range(10)) == expected, "a plan that is not whole leaves them for others"


def test_closing_writes_only_what_may_be_needed(tmp_path: Path) -> None:
    config = store_config(tmp_path, host=20, disk=40)
    with BlockStore.open(config) as store:
        following = store.follow(plan((0, 1), (0, 2), whole=True))
        put(store, 0, 1, 2)
        following.advance(1)
    with BlockStore.open(config) as store:
        assert [store.contains(name(number)) for number in (0, 1, 2)] == [True, False, True]


def test_lines_that_come_later_change_what_is_kept(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=2)) as store:
        following = store.follow(JobPlan(whole=True))
        put(store, 0)
        following.announce([name(1)])
        following.announce([name(0)])
        put(store, 1)
        store.put_many([(name(2), content(2))])
        assert [store.contains(name(number)) for number in range(3)] == [True, True, False]
        following.advance(2)
        following.announce([name(2)])
        put(store, 2)
        assert store.contains(name(2))


def test_an_expected_block_survives_what_the_plan_says(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        following = store.follow(plan((0, 1), (2, 3), (4, 5), (2, 3), whole=True))
        following.advance(1)
        following.expect([name(0)])
        put(store, 0, 1)
        put(store, 2, 3)
        put(store, 4)
        assert store.contains(name(0))
        assert not store.contains(name(1))
        assert get(store, 0) == [True]
        following.met([name(0)])
        put(store, 5)
        assert not store.contains(name(0)), "it was loaded, and is not needed again"


def test_the_device_is_told_what_to_put_when_it_lets_go(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=10)) as store:
        put(store, 0, 5)
        for whole in (True, False):
            following = store.follow(plan((0, 1), (0, 1, 2), whole=whole))
            following.took([name(number) for number in (0, 1, 5, 6)])
            asked = {number: following.lets_go(name(number)) for number in (0, 1, 5, 6)}
            assert asked == {0: False, 1: True, 5: False, 6: not whole}, "what is needed, unless it is held already"
        assert store.stats().spared == 2, "5 and 6 under the plan that is whole"


def test_blocks_are_fetched_ahead_of_their_line(tmp_path: Path) -> None:
    config = store_config(tmp_path, host=0, disk=40)
    with BlockStore.open(config) as store:
        put(store, *range(12))
    with BlockStore.open(store_config(tmp_path, host=12, disk=40)) as store:
        following = store.follow(plan((0, 1), (0, 2), (0, 3)))
        assert settled(store, 3)["fetched"] == 3, "a quarter of the host tier is promised at once"
        following.advance(1)
        assert settled(store, 4) == {"fetched": 4}
        assert get(store, 0, 1, 2, 3) == [True] * 4
        assert get(store, 0) == [True]
        stats = store.stats()
        assert (stats.tiers["disk"].hits, stats.prefetch_hits, stats.late_loads) == (0, 4, 0)


def test_what_the_device_has_is_not_fetched(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=0, disk=40)) as store:
        put(store, 0, 1)
    with BlockStore.open(store_config(tmp_path, host=12, disk=40)) as store:
        following = store.follow(JobPlan())
        following.took([name(0)])
        following.announce([name(0), name(1)])
        following.advance(0)
        assert settled(store, 1) == {"fetched": 1}
        assert [len(store.locate(name(number))) for number in (0, 1)] == [1, 2]
        assert get(store, 0) == [True]
        assert store.stats().late_loads == 1
        assert len(store.locate(name(0))) == 1, "the device wanted it: no copy stays on the way"


def test_a_prefetch_displaces_nothing_that_is_needed_sooner(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=0, disk=40)) as store:
        put(store, *range(12))
    with BlockStore.open(store_config(tmp_path, host=4, disk=40)) as store:
        store.follow(None)
        assert get(store, 0, 1, 2, 3) == [True] * 4, "promoted, so the host tier is full"
        following = store.follow(plan((0, 1, 2, 3), (8,)))
        following.advance(0)
        assert (store.stats().prefetches, store.stats().queued_reads) == ({}, 0), "not even read"
        following.advance(1)
        assert settled(store, 1) == {"fetched": 1}
        assert len(store.locate(name(8))) == 2, "once nobody needs the others"


def test_a_line_of_many_blocks_is_fetched_as_room_comes(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=0, disk=40)) as store:
        put(store, *range(12))
    with BlockStore.open(store_config(tmp_path, host=12, disk=40)) as store:
        following = store.follow(plan(tuple(range(12))))
        for ended in range(3, 13, 3):
            assert settled(store, ended)["fetched"] == ended, "a quarter of the host tier at a time"
            following.advance(0)
        assert get(store, *range(12)) == [True] * 12
        assert store.stats().prefetch_hits == 12


def test_what_is_on_disk_is_put_only_where_it_is_needed_sooner(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=4, disk=40)) as store:
        following = store.follow(plan((0, 1, 2, 3), (8,), (9,)))
        put(store, 8)
        assert store.flush()
        put(store, 0, 1, 2, 3)
        assert store.put_many([(name(8), content(8))]) == [False], "it can be loaded from disk when it is time"
        assert on_disk(store, range(10)) >= {8}
        following.advance(1)
        put(store, 8)


def test_without_a_plan_it_goes_by_recency(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        store.follow(plan((0,), (1,), (0,)))
        put(store, 0)
        following = store.follow(None)
        for number in range(1, 5):
            put(store, number)
        assert not store.contains(name(0))
        following.announce([name(9)])
        following.advance(3)
        following.expect([name(1)])
        following.took([name(1)])
        assert [following.lets_go(name(number)) for number in (0, 1)] == [True, False]
        put(store, 5)
        assert not store.contains(name(1)), "the oldest, whatever was said"
        store.check()


def test_what_the_device_gives_back_is_not_refused_for_its_own_copies(tmp_path: Path) -> None:
    """Copies of what the device had leave for what is needed later, but not once the device has given them back."""
    with BlockStore.open(store_config(tmp_path, host=4)) as store:
        following = store.follow(plan((0, 1), (2, 3), (4,), (0, 1), (2, 3)))
        put(store, 0, 1, 2, 3)
        assert get(store, 0, 1, 2, 3) == [True] * 4
        following.took([name(number) for number in range(4)])
        put(store, 4)
        for number in (0, 1):
            if following.lets_go(name(number)):
                put(store, number)
        assert [store.contains(name(number)) for number in (0, 1, 4)] == [True] * 3


def test_nothing_waits_for_the_disk_to_take_what_the_plan_does_not_know(tmp_path: Path) -> None:
    """A disk that takes nothing: what is needed waits for it, what may be needed by nobody leaves."""
    stuck = Faults(seed=1, stuck=1.0)
    config = store_config(tmp_path, host=4, disk=40, disk_faults=stuck, deadlines=Deadlines(put_s=0.05))
    with BlockStore.open(config) as store:
        store.follow(plan((0,), (1,)))
        for number in range(10):
            put(store, number)
        assert [store.contains(name(number)) for number in (0, 1, 9)] == [True] * 3
        assert store.stats().tiers["disk"].drops["not_needed"] > 0
        assert store.stats().put_drops == 0
        store._parts.own[0].heal()
