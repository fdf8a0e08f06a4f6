"""The pool's books balance after any sequence of calls, and what is found is what was sealed."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from spillway.kvstore import BlockHash
from spillway.node_agent.blocks import BlockManager


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "little"))


class Pool(RuleBasedStateMachine):
    """``held`` are the references we took; ``content`` what we know each sealed block to hold."""

    @initialize(size=st.integers(1, 12))
    def start(self, size: int) -> None:
        self.pool = BlockManager(size, 16)
        self.held: list[int] = []
        self.content: dict[int, int] = {}

    @precondition(lambda self: self.pool.available)
    @rule()
    def allocate(self) -> None:
        block, evicted = self.pool.allocate()
        assert block not in self.held
        known = self.content.pop(block, None)
        assert evicted == (name(known) if known is not None else None)
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), number=st.integers(0, 6))
    def seal(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from(self.held))
        if block in self.content:
            return
        kept = self.pool.seal(block, name(number))
        if kept != block:
            assert self.content[kept] == number
            self.held.remove(block)
            self.held.append(kept)
        elif self.pool.find(name(number)) == block:
            self.content[block] = number

    @rule(numbers=st.lists(st.integers(0, 6), max_size=4))
    def reuse(self, numbers: list[int]) -> None:
        found = self.pool.match([name(number) for number in numbers])
        assert [self.content[block] for block in found] == numbers[: len(found)]
        for block in found:
            self.pool.acquire(block)
        self.held.extend(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.pool.release([block])

    @rule(limit=st.integers(0, 4))
    def spill(self, limit: int) -> None:
        for block, block_name in self.pool.take_unspilled(limit):
            assert name(self.content[block]) == block_name

    @rule(numbers=st.lists(st.integers(0, 6), max_size=4))
    def set_aside(self, numbers: list[int]) -> None:
        self.pool.set_aside([name(number) for number in numbers])

    @rule(numbers=st.lists(st.integers(0, 6), max_size=4))
    def bring_back(self, numbers: list[int]) -> None:
        self.pool.bring_back([name(number) for number in numbers])

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.used == len(set(self.held))
        for block in set(self.held):
            assert self.pool.refs(block) == self.held.count(block)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_tail_of_a_released_table_is_evicted_before_its_head() -> None:
    pool = BlockManager(3, 16)
    table = [pool.allocate()[0] for _ in range(3)]
    for number, block in enumerate(table):
        pool.seal(block, name(number))
    pool.release(table)
    assert [pool.allocate()[1] for _ in range(3)] == [name(2), name(1), name(0)]


def test_what_is_set_aside_is_evicted_first_unless_somebody_wants_it_again() -> None:
    pool = BlockManager(4, 16)
    table = [pool.allocate()[0] for _ in range(4)]
    for number, block in enumerate(table):
        pool.seal(block, name(number))
    pool.release(table)
    pool.set_aside([name(1), name(0)])
    pool.bring_back([name(1)])
    assert pool.cached == pool.available == 4
    assert [pool.allocate()[1] for _ in range(4)] == [name(0), name(3), name(2), name(1)]


def test_a_block_under_a_matched_prefix_is_not_counted_as_room() -> None:
    pool = BlockManager(4, 16)
    table = [pool.allocate()[0] for _ in range(3)]
    for number, block in enumerate(table):
        pool.seal(block, name(number))
    pool.release(table)
    assert pool.available == 4
    assert pool.available_besides(pool.match([name(0), name(1)])) == 2
