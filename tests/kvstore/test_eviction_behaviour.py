"""What every eviction policy does, then what each one is for."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_factories import name

from spillway.kvstore import BlockHash, JobPlan
from spillway.kvstore.eviction.arc import ARC
from spillway.kvstore.eviction.base import EvictionPolicy
from spillway.kvstore.eviction.lru import LRU
from spillway.kvstore.eviction.next_use import NextUse
from spillway.kvstore.planning.uses import NextUses

NAMES = [name(number) for number in range(30)]


def planned(*, whole: bool = False) -> NextUse:
    uses = NextUses()
    uses.begin(JobPlan([NAMES[number : number + 4] for number in (0, 8, 4, 0, 16)], whole=whole))
    return NextUse(uses, LRU(), below_device=True)


def plan_of(policy: NextUse) -> JobPlan:
    assert policy._uses.plan is not None
    return policy._uses.plan


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "arc": lambda: ARC(8),
    "next-use-without-plan": lambda: NextUse(NextUses(), ARC(8)),
    "next-use": planned,
}
STEPS = st.lists(
    st.tuples(st.sampled_from(["insert", "touch", "evict", "drop"]), st.sampled_from(NAMES[:20])), max_size=60
)


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES.keys())
@given(steps=STEPS, limit=st.integers(0, 25))
def test_it_orders_exactly_the_blocks_that_are_held(
    make: Callable[[], EvictionPolicy], steps: list[tuple[str, BlockHash]], limit: int
) -> None:
    policy, held = make(), set()
    for action, block in steps:
        if action == "insert":
            policy.insert(block)
            held.add(block)
        elif action == "touch":
            policy.touch(block)
        elif block in held:
            policy.remove(block, evicted=action == "evict")
            held.discard(block)
    everything = policy.coldest(len(NAMES))
    assert sorted(everything) == sorted(held)
    assert policy.coldest(limit) == everything[:limit], "the order depends on how much of it is asked for"


@pytest.mark.parametrize("make", [LRU, lambda: ARC(8), lambda: NextUse(NextUses(), LRU())])
def test_without_reuse_the_oldest_leaves_first(make: Callable[[], EvictionPolicy]) -> None:
    policy = make()
    for block in NAMES[:5]:
        policy.insert(block)
    assert policy.coldest(5) == NAMES[:5]


@pytest.mark.parametrize("make", [LRU, lambda: ARC(8), lambda: NextUse(NextUses(), LRU())])
def test_a_touched_block_stays_longer(make: Callable[[], EvictionPolicy]) -> None:
    policy = make()
    for block in NAMES[:3]:
        policy.insert(block)
    policy.touch(NAMES[0])
    assert policy.coldest(1) == [NAMES[1]]


class TestARC:
    """What LRU cannot do."""

    def run(self, policy: EvictionPolicy, accesses: list[BlockHash], capacity: int) -> int:
        held: set[BlockHash] = set()
        hits = 0
        for block in accesses:
            if block in held:
                hits += 1
                policy.touch(block)
                continue
            if len(held) == capacity:
                victim = policy.coldest(1)[0]
                held.discard(victim)
                policy.remove(victim, evicted=True)
            held.add(block)
            policy.insert(block)
        return hits

    def test_a_scan_does_not_flush_what_is_used_often(self) -> None:
        """Four blocks that are used again and again, between scans over blocks that are used once."""
        accesses: list[BlockHash] = []
        for turn in range(30):
            accesses += [*NAMES[:4], *NAMES[:4], *(name(100 + 8 * turn + number) for number in range(8))]
        lru, arc = self.run(LRU(), accesses, 8), self.run(ARC(8), accesses, 8)
        assert lru == 30 * 4, "only the immediate repeats"
        assert arc > 1.7 * lru

    def test_ghosts_are_bounded(self) -> None:
        policy = ARC(8)
        self.run(policy, [name(number) for number in range(500)], 8)
        assert policy._known() <= 2 * 8


class TestNextUse:
    """Belady's order on a plan of lines 0 … 4, each with four blocks; line 3 is line 0 again."""

    def test_what_the_plan_does_not_know_leaves_first_then_the_furthest(self) -> None:
        policy = planned()
        again, unplanned, at_4, at_1 = NAMES[0], NAMES[29], NAMES[16], NAMES[8]
        policy.rekey(plan_of(policy).advance(1))
        for block in (at_1, at_4, unplanned, again):
            policy.insert(block)
        assert policy.coldest(4) == [unplanned, at_4, again, at_1], "line 0's blocks are needed again by line 3"
        policy.rekey(plan_of(policy).advance(4))
        assert policy.coldest(4)[3:] == [at_4], "no line needs the others, as far as is known"

    def test_what_a_whole_plan_does_not_name_leaves_before_all_others(self) -> None:
        policy = planned(whole=True)
        policy.rekey(plan_of(policy).advance(2))
        for block in (NAMES[16], NAMES[8], NAMES[4], NAMES[29]):
            policy.insert(block)
        assert policy.coldest(4) == [NAMES[8], NAMES[29], NAMES[16], NAMES[4]]

    def test_of_one_line_the_last_block_leaves_first(self) -> None:
        policy = planned()
        for block in NAMES[16:20]:
            policy.insert(block)
        assert policy.coldest(4) == NAMES[16:20][::-1]

    def test_a_spent_block_is_not_worth_writing_if_the_plan_is_whole(self) -> None:
        for whole in (False, True):
            policy = planned(whole=whole)
            assert policy.worth_keeping(NAMES[8])
            assert policy.worth_keeping(NAMES[29]) == (not whole)
            assert policy.unplanned(NAMES[29]) == (not whole)
            plan_of(policy).advance(2)
            assert policy.worth_keeping(NAMES[8]) == (not whole)

    def test_an_expected_block_is_kept_whatever_the_plan_says(self) -> None:
        policy = planned(whole=True)
        plan_of(policy).advance(5)
        for block in NAMES[:2]:
            policy.insert(block)
        policy._uses.expect([NAMES[0]])
        policy.rekey([NAMES[0]])
        assert policy.worth_keeping(NAMES[0])
        assert policy.coldest(2) == [NAMES[1], NAMES[0]]
        policy._uses.met([NAMES[0]])
        assert not policy.worth_keeping(NAMES[0])

    def test_a_copy_of_what_the_device_has_leaves_before_what_is_needed(self) -> None:
        policy = planned()
        policy.insert(NAMES[0])
        policy.insert(NAMES[16])
        policy._uses.took([NAMES[0]])
        policy.rekey([NAMES[0]])
        assert policy.coldest(2) == [NAMES[0], NAMES[16]]
        assert not policy.worth_keeping(NAMES[0]), "the device puts it again"
        policy._uses.let_go([NAMES[0]])
        policy.rekey([NAMES[0]])
        assert policy.coldest(2) == [NAMES[16], NAMES[0]]
        assert policy.worth_keeping(NAMES[0])

    def test_sooner_compares_next_uses(self) -> None:
        policy = planned()
        plan_of(policy).advance(2)
        policy._uses.took([NAMES[0]])
        at_2, at_4, unplanned, on_device = NAMES[4], NAMES[16], NAMES[29], NAMES[0]
        order = [at_2, at_4, unplanned, on_device]
        for place, block in enumerate(order):
            assert [policy.sooner(block, other) for other in order[place + 1 :]] == [True] * (3 - place)
            assert [policy.sooner(other, block) for other in order[place + 1 :]] == [False] * (3 - place)
