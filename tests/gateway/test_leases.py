"""Every line is with at most one worker at a time, comes back if the worker is lost, and is given up in the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spillway.gateway.service.leases import GivenUp, LeaseBook, LeaseEnd, LeaseRules


class FakeLines:
    """Lines in a given order, some of them done."""

    def __init__(self, order: list[int]) -> None:
        self.order = np.array(order, dtype=np.uint32)
        self.done: set[int] = set()

    def undone_places(self) -> npt.NDArray[np.bool_]:
        return np.array([int(index) not in self.done for index in self.order], dtype=bool)

    def is_done(self, index: int) -> bool:
        return index in self.done


def book(order: list[int], ttl_s: float = 10, max_attempts: int = 3) -> tuple[LeaseBook, FakeLines]:
    lines = FakeLines(order)
    return LeaseBook(lines, LeaseRules(ttl_s, max_attempts)), lines


def finish(leases: LeaseBook, lines: FakeLines, index: int) -> None:
    lines.done.add(index)
    leases.finished(index)


def test_neighbours_go_together_and_each_line_goes_once() -> None:
    leases, _ = book([3, 1, 2, 0])
    first, second = leases.take("a", 3, 0), leases.take("b", 3, 0)
    assert first is not None
    assert second is not None
    assert (list(first.lines), list(second.lines)) == ([3, 1, 2], [0])
    assert leases.take("c", 3, 0) is None
    assert leases.num_leased == 4


def test_what_comes_back_goes_first_and_in_order() -> None:
    leases, _ = book([3, 1, 2, 0, 4])
    lost, kept = leases.take("a", 2, 0), leases.take("b", 1, 5)
    assert lost is not None
    assert kept is not None
    assert leases.expire(10.5) == []
    again = leases.take("c", 3, 11)
    assert again is not None
    assert list(again.lines) == [3, 1, 0]
    assert (leases.attempt(3), leases.attempt(0), leases.attempt(2)) == (2, 1, 1)


def test_a_renewed_lease_lasts() -> None:
    leases, _ = book([0])
    lease = leases.take("a", 1, 0)
    assert lease is not None
    for now in range(5, 100, 5):
        assert leases.renew(lease.id, now)
        assert leases.expire(now) == []
    assert leases.expire(200) == []
    assert not leases.renew(lease.id, 200)
    assert leases.num_leased == 0


def test_a_poisonous_line_is_given_up_with_its_history() -> None:
    leases, _ = book([7], max_attempts=3)
    lease = leases.take("a", 1, 0)
    assert lease is not None
    assert leases.expire(11) == []
    lease = leases.take("b", 1, 20)
    assert lease is not None
    assert leases.failed(lease.id, 7, "no memory") is None
    lease = leases.take("c", 1, 30)
    assert lease is not None
    assert leases.expire(50) == [GivenUp(7, ("a: lease ran out", "b: no memory", "c: lease ran out"))]
    assert leases.take("d", 1, 60) is None


def test_giving_back_is_no_attempt() -> None:
    leases, _ = book([0, 1], max_attempts=1)
    for _ in range(5):
        lease = leases.take("a", 2, 0)
        assert lease is not None
        leases.give_back(lease.id)
        assert not leases.renew(lease.id, 1)
    assert leases.attempt(0) == 1


def test_a_late_result_ends_the_claim_of_the_next_worker() -> None:
    leases, lines = book([0])
    leases.take("slow", 1, 0)
    leases.expire(11)
    second = leases.take("fast", 1, 12)
    assert second is not None
    finish(leases, lines, 0)  # by the slow one, after all
    assert not leases.renew(second.id, 13)
    assert leases.expire(100) == []
    assert leases.take("c", 1, 101) is None


def test_a_line_finished_while_nobody_holds_it_is_not_handed_out() -> None:
    leases, lines = book([0, 1])
    leases.take("a", 1, 0)
    leases.expire(11)
    finish(leases, lines, 0)
    finish(leases, lines, 1)
    assert leases.take("b", 2, 12) is None


def test_a_stale_lease_cannot_fail_a_line_of_another() -> None:
    leases, _ = book([0], max_attempts=1)
    stale = leases.take("a", 1, 0)
    assert stale is not None
    leases.give_back(stale.id)
    leases.take("b", 1, 1)
    assert leases.failed(stale.id, 0, "x") is None
    assert leases.num_leased == 1


def test_revoking_ends_every_claim() -> None:
    leases, _ = book([0, 1, 2])
    first, second = leases.take("a", 2, 0), leases.take("b", 1, 0)
    assert first is not None
    assert second is not None
    leases.revoke()
    assert not leases.renew(first.id, 1)
    assert not leases.renew(second.id, 1)
    assert leases.num_leased == 0


class LeasesLoseNothing(RuleBasedStateMachine):
    """Any interleaving: no line is with two, none is lost, all end as done or given up."""

    def __init__(self) -> None:
        super().__init__()
        self.leases, self.lines = book([4, 2, 0, 3, 1, 5], ttl_s=10, max_attempts=2)
        self.now = 0.0
        self.ids: list[str] = []  # leases by number: their names are random
        self.held: dict[int, set[int]] = {}
        self.expires: dict[int, float] = {}
        self.given_up: set[int] = set()

    def drop(self, lease: int) -> None:
        del self.held[lease], self.expires[lease]

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        lease = self.leases.take("w", count, self.now)
        if lease is None:
            out = self.lines.done | self.given_up | set().union(*self.held.values())
            assert out == set(range(6))
            return
        taken = set(lease.lines)
        assert taken
        assert not taken & (self.lines.done | self.given_up | set().union(*self.held.values()))
        self.ids.append(lease.id)
        self.held[len(self.ids)], self.expires[len(self.ids)] = taken, self.now + 10

    @rule(count=st.integers(1, 4), span=st.tuples(st.integers(0, 6), st.integers(0, 6)))
    def take_from_a_part(self, count: int, span: tuple[int, int]) -> None:
        lease = self.leases.take("w", count, self.now, span)
        out = self.lines.done | self.given_up | set().union(*self.held.values())
        wanted = [int(index) for index in self.lines.order[slice(*span)] if index not in out]
        if lease is None:
            assert not wanted
            return
        assert list(lease.lines) == wanted[:count]
        self.ids.append(lease.id)
        self.held[len(self.ids)], self.expires[len(self.ids)] = set(lease.lines), self.now + 10

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        gone = [lease for lease, expires in self.expires.items() if expires < self.now]
        lines = set().union(*(self.held[lease] for lease in gone))
        given_up = {line.index for line in self.leases.expire(self.now)}
        assert given_up <= lines
        self.lines.done |= given_up  # the job writes an error for them
        self.given_up |= given_up
        for lease in gone:
            self.drop(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.held)))
        assert self.leases.renew(self.ids[lease - 1], self.now)
        self.expires[lease] = self.now + 10

    @precondition(lambda self: len(self.lines.done) < 6)
    @rule(data=st.data())
    def finish_any(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(set(range(6)) - self.lines.done)))
        finish(self.leases, self.lines, index)
        for lease, lines in list(self.held.items()):
            lines.discard(index)
            if not lines:
                self.drop(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.held)))
        index = data.draw(st.sampled_from(sorted(self.held[lease])))
        if self.leases.failed(self.ids[lease - 1], index, "x") is not None:
            self.lines.done.add(index)
            self.given_up.add(index)
        self.held[lease].discard(index)
        if not self.held[lease]:
            self.drop(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.held)))
        self.leases.give_back(self.ids[lease - 1])
        self.drop(lease)

    @invariant()
    def the_count_is_right(self) -> None:
        assert self.leases.num_leased == sum(map(len, self.held.values()))

    def teardown(self) -> None:
        for _ in range(20):
            self.now += 100
            self.lines.done |= {line.index for line in self.leases.expire(self.now)}
            self.leases.take("last", 2, self.now)
        self.lines.done |= {line.index for line in self.leases.expire(self.now + 100)}
        assert self.lines.done == set(range(6))


TestLeasesLoseNothing = LeasesLoseNothing.TestCase
TestLeasesLoseNothing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_end_of_a_lease_is_told_with_what_became_of_its_last_line() -> None:
    lines, told = FakeLines([0, 1, 2, 3, 4, 5]), list[tuple[str, LeaseEnd]]()
    leases = LeaseBook(lines, LeaseRules(10, 3), on_over=lambda lease, end: told.append((lease.worker, end)))
    held = {worker: leases.take(worker, 1 + (worker == "done"), 0) for worker in ("done", "failed", "back", "late")}
    ids = {worker: lease.id for worker, lease in held.items() if lease is not None}
    finish(leases, lines, 0)
    assert told == []  # it holds another line
    leases.renew(ids["done"], 5)
    finish(leases, lines, 1)
    leases.failed(ids["failed"], 2, "no luck")
    leases.give_back(ids["back"])
    leases.expire(11)
    assert told == [
        ("done", LeaseEnd.DONE),
        ("failed", LeaseEnd.FAILED),
        ("back", LeaseEnd.RETURNED),
        ("late", LeaseEnd.EXPIRED),
    ]
    assert leases.num_leases == 0
