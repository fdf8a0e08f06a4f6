"""The plan answers what the lines say."""

from functools import partial

from hypothesis import given
from hypothesis import strategies as st
from kv_factories import IDENTITY, name

from spillway.kvstore import BlockHash, JobPlan, block_hash
from spillway.kvstore.planning.uses import EXPECTED, NextUses, Use


def chain(tokens: list[int]) -> list[BlockHash]:
    blocks, parent = [], IDENTITY.root()
    for token in tokens:
        parent = block_hash(parent, [token])
        blocks.append(parent)
    return blocks


LINES = st.lists(st.lists(st.integers(0, 2), max_size=5).map(chain), max_size=12)


@given(LINES, st.integers(0, 13))
def test_next_use_is_the_first_coming_line_that_has_the_block(lines: list[list[BlockHash]], position: int) -> None:
    plan = JobPlan(lines)
    plan.advance(position)
    for block in {block for line in lines for block in line}:
        later = [number for number, line in enumerate(lines) if number >= position and block in line]
        assert (block in plan) == bool(later)
        found = plan.next_use(block)
        if found is None or found > position:
            assert later[:1] == ([] if found is None else [found])
        else:
            assert all(block in line for line in lines[found : position + 1]), "a stretch that is not over"


@given(LINES, st.integers(0, 13))
def test_coming_lines_read_back_in_order(lines: list[list[BlockHash]], position: int) -> None:
    plan = JobPlan(iter(lines))
    plan.advance(position)
    assert plan.lines == len(lines)
    begun = plan.position
    assert begun == min(position, len(lines))
    assert [plan.blocks_of(number) for number in range(len(lines))] == [()] * begun + [tuple(x) for x in lines[begun:]]
    assert plan.blocks_of(len(lines)) == plan.blocks_of(-1) == ()


def test_an_unknown_block_is_not_in_the_plan() -> None:
    plan = JobPlan([chain([1, 2])])
    assert name(999) not in plan
    assert plan.next_use(name(999)) is None
    assert plan.depth(name(999)) == 0


@given(LINES, st.lists(st.integers(0, 14), max_size=5))
def test_a_plan_names_every_block_whose_next_use_changed(lines: list[list[BlockHash]], positions: list[int]) -> None:
    """As it grows at one end and is used up at the other."""
    plan = JobPlan()
    blocks = {block for line in lines for block in line}
    steps = [partial(plan.append, line) for line in lines] + [partial(plan.advance, each) for each in positions]
    for step in [*steps[::2], *steps[1::2], plan.end]:
        before = {block: plan.next_use(block) for block in blocks}
        told = step()
        assert {block for block in blocks if plan.next_use(block) != before[block]} <= set(told)


@given(LINES)
def test_a_plan_forgets_what_is_over(lines: list[list[BlockHash]]) -> None:
    plan = JobPlan()
    for number, line in enumerate(lines):
        plan.append(line)
        plan.advance(number + 1)
        assert len(plan) == len(line), "the next line may share with the last one, and with no other"
    plan.end()
    assert len(plan) == 0


def test_a_long_stretch_is_one_use() -> None:
    """However many lines ask about a document, in the window and before it."""
    document = chain([1, 2, 3])
    plan = JobPlan()
    for number in range(500):
        plan.append([*document, name(1000 + number)])
    assert plan.next_use(document[0]) == 0
    assert plan.advance(499) == [name(1000 + number) for number in range(499)]
    assert [plan.next_use(block) for block in document] == [0, 0, 0], "needed now"
    assert set(plan.end()) == set()
    assert set(plan.advance(500)) == {*document, name(1499)}


def test_without_a_plan_nothing_is_known() -> None:
    uses = NextUses()
    assert uses.next_use(name(1)) is Use.UNKNOWN
    uses.begin(JobPlan([[name(1)]], whole=True))
    assert uses.plan is not None
    assert (uses.plan.position, uses.next_use(name(1))) == (0, 0)
    uses.plan.advance(1)
    assert uses.next_use(name(1)) is Use.NEVER
    uses.plan.advance(0)
    assert uses.plan.position == 1, "positions only rise"
    uses.plan.whole = False
    assert uses.next_use(name(1)) is Use.UNKNOWN


def test_what_several_sequences_expect_is_expected_until_the_last_has_it() -> None:
    uses = NextUses()
    uses.begin(JobPlan(whole=True))
    uses.expect([name(1), name(2)])
    uses.expect([name(1), name(3)])
    assert (uses.next_use(name(1)), uses.depth(name(3))) == (EXPECTED, 1)
    uses.met([name(1), name(2)])
    assert (uses.next_use(name(1)), uses.next_use(name(2))) == (EXPECTED, Use.NEVER)
    uses.met([name(1), name(3)])
    assert uses.next_use(name(1)) is Use.NEVER
