"""The plan answers what the lines say."""

from hypothesis import given
from hypothesis import strategies as st
from kv_factories import IDENTITY, name

from spillway.kvstore import BlockHash, JobPlan, block_hash
from spillway.kvstore.planning.uses import NextUses, Use


def chain(tokens: list[int]) -> list[BlockHash]:
    blocks, parent = [], IDENTITY.root()
    for token in tokens:
        parent = block_hash(parent, [token])
        blocks.append(parent)
    return blocks


LINES = st.lists(st.lists(st.integers(0, 2), max_size=5).map(chain), max_size=12)


@given(LINES, st.integers(0, 13))
def test_next_use_is_the_first_line_that_has_the_block(lines: list[list[BlockHash]], position: int) -> None:
    plan = JobPlan(lines)
    for block in {block for line in lines for block in line}:
        later = [number for number, line in enumerate(lines) if number >= position and block in line]
        assert plan.next_use(block, position) == (later[0] if later else None)
        assert block in plan


@given(LINES)
def test_a_line_reads_back_in_order(lines: list[list[BlockHash]]) -> None:
    plan = JobPlan(iter(lines))
    assert len(plan) == len(lines)
    assert [plan.blocks_of(number) for number in range(len(lines))] == lines
    assert plan.blocks_of(len(lines)) == plan.blocks_of(-1) == []


def test_an_unknown_block_is_not_in_the_plan() -> None:
    plan = JobPlan([chain([1, 2])])
    assert name(999) not in plan
    assert plan.next_use(name(999), 0) is None


@given(LINES, st.lists(st.integers(0, 14), max_size=5))
def test_advancing_names_every_block_whose_next_use_changed(lines: list[list[BlockHash]], positions: list[int]) -> None:
    uses = NextUses()
    uses.begin(JobPlan(lines))
    blocks = {block for line in lines for block in line}
    for position in positions:
        before = {block: uses.next_use(block) for block in blocks}
        told = uses.advance(position)
        assert {block for block in blocks if uses.next_use(block) != before[block]} <= set(told)


def test_without_a_plan_nothing_is_known() -> None:
    uses = NextUses()
    assert uses.next_use(name(1)) is Use.UNKNOWN
    assert uses.advance(10) == []
    uses.begin(JobPlan([[name(1)]]))
    assert (uses.position, uses.next_use(name(1))) == (0, 0)
    uses.advance(1)
    assert uses.next_use(name(1)) is Use.NEVER
    uses.advance(0)
    assert uses.position == 1, "positions only rise"
