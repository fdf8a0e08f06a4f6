"""Tenants share the agents by weight, nobody starves, and nobody saves up by idling."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.gateway.service.fair import FairShare

NAMES = ("a", "b", "c", "d")
LARGEST = 1000
charges = st.integers(1, LARGEST)


def test_turns_go_by_weight() -> None:
    shares, weights, got = FairShare(), {"a": 3.0, "b": 1.0}, {"a": 0, "b": 0}
    for _ in range(400):
        tenant = shares.order(weights)[0]
        got[tenant] += 1
        shares.charge(tenant, 10, weights[tenant])
    assert abs(got["a"] - 300) <= 1


def test_who_comes_back_gets_a_turn_soon_but_no_more_than_its_share() -> None:
    shares = FairShare()
    for _ in range(1000):
        shares.order({"a": 1.0})
        shares.charge("a", 10, 1)
    turns = []
    for _ in range(20):
        tenant = shares.order({"a": 1.0, "b": 1.0})[0]
        turns.append(tenant)
        shares.charge(tenant, 10, 1)
    assert "b" in turns[:2]
    assert turns.count("b") <= 11


def test_debts_outlast_a_short_absence() -> None:
    shares = FairShare()
    for tenant in ("a", "b"):
        shares.order({"a": 1.0, "b": 1.0})
        shares.charge(tenant, 10, 1)
    shares.charge("a", 1000, 1)
    shares.order({"b": 1.0})
    assert shares.order({"a": 1.0, "b": 1.0})[0] == "b"


@given(
    st.lists(st.tuples(st.sets(st.sampled_from(NAMES), min_size=1), charges), min_size=1, max_size=120),
    st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 2.0, 5.0]) for name in NAMES}),
)
@settings(max_examples=150, deadline=None)
def test_shares_differ_by_no_more_than_the_largest_charges(
    steps: list[tuple[set[str], int]], weights: dict[str, float]
) -> None:
    """Over any stretch in which two tenants have work throughout."""
    shares, served = FairShare(), []
    for active, tokens in steps:
        first = shares.order({name: weights[name] for name in active})[0]
        shares.charge(first, tokens, weights[first])
        served.append((active, first, tokens))
    for one, other in itertools.combinations(NAMES, 2):
        run = {one: 0.0, other: 0.0}
        for active, tenant, tokens in served:
            if not {one, other} <= active:
                run = {one: 0.0, other: 0.0}
            elif tenant in run:
                run[tenant] += tokens / weights[tenant]
            # Each may have come with one charge that it was ahead by, and may be ahead by one more now.
            assert abs(run[one] - run[other]) <= 2 * LARGEST / min(weights[one], weights[other])


@given(st.lists(st.tuples(st.sets(st.sampled_from(NAMES)), st.integers(1, 10)), max_size=200))
@settings(max_examples=150, deadline=None)
def test_nobody_starves(steps: list[tuple[set[str], int]]) -> None:
    """Whoever has work waits for no more than the others' catching up: a bounded number of turns."""
    shares, waited = FairShare(), dict.fromkeys(NAMES, 0)
    for active, tokens in steps:
        order = shares.order(dict.fromkeys(active, 1.0))
        assert set(order) == active
        for name in NAMES:
            waited[name] = waited[name] + 1 if name in active and name != order[0] else 0
        if order:
            shares.charge(order[0], tokens, 1)
        # Each of three others may catch up on the one charge that this tenant was ahead by, 1 at a time.
        assert all(turns <= 3 * (10 + 1) for turns in waited.values())


def test_what_is_remembered_does_not_grow_with_tenants_that_are_gone() -> None:
    shares = FairShare()
    for number in range(1000):
        shares.order({f"t{number}": 1.0})
        shares.charge(f"t{number}", 1, 1)
    assert len(shares._times) <= 3
