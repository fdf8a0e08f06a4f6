"""Whatever the pool, the store and its faults do: every sequence attends to its own KV, and ends as it would alone.

The "model" of these tests is a hash chain. The KV of a position is the digest of all tokens up to it, and the next
token is drawn from the last digest, so one wrong, stale or missing block changes everything after it. Blocks are real
bytes that go through the real store.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spillway.kvstore import BlockStore, JobPlan, KVIdentity, StoreConfig, StoreStats
from spillway.node_agent.blocks import BlockManager
from spillway.node_agent.plan import StepPlan, StepResult
from spillway.node_agent.request import Request, SamplingParams, Sequence
from spillway.node_agent.scheduler import Scheduler, SchedulerConfig

BLOCK_TOKENS = 4
SLOT_BYTES = 1024
VOCAB = 5
IDENTITY = KVIdentity("weights", "float32", "none", BLOCK_TOKENS, (0, 1), 0, 1, "positions")


def digest(before: bytes, token: int) -> bytes:
    return blake2b(before + bytes([token]), digest_size=16).digest()


def next_token(kv: bytes, choice: int) -> int:
    return (kv[0] + choice) % VOCAB


def alone(prompt: list[int], max_tokens: int, choice: int) -> list[int]:
    tokens, kv = list(prompt), b""
    for token in prompt:
        kv = digest(kv, token)
    for _ in range(max_tokens):
        tokens.append(next_token(kv, choice))
        kv = digest(kv, tokens[-1])
    return tokens


@dataclass
class HashChainRank:
    """Carries out plans on a pool of digests; a share ``miss_rate`` of the fetches fails and leaves garbage."""

    store: BlockStore | None
    pool: np.ndarray
    miss_rate: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def run(self, plan: StepPlan) -> StepResult:
        fetched: list[bool] = []
        if self.store is not None:
            self.store.put_many([(name, self.pool[block].reshape(-1)) for block, name in plan.spills])
            fetched = self.store.get_many([(name, self.pool[block].reshape(-1)) for name, block in plan.fetches])
        for index, (_, block) in enumerate(plan.fetches):
            if self.random.random() < self.miss_rate:
                self.pool[block] = 0xEE
                fetched[index] = False
        for source, target in plan.copies:
            self.pool[target] = self.pool[source]
        for work in [*plan.decodes, *plan.prefills]:
            kv = self.kv(work.blocks, work.start - 1) if work.start else b""
            for position, token in enumerate(work.tokens, work.start):
                kv = digest(kv, token)
                slot = self.pool[work.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS]
                slot[:] = 0
                slot[:16] = np.frombuffer(kv, np.uint8)
        return StepResult(fetched, None)

    def kv(self, blocks: list[int], position: int) -> bytes:
        return self.pool[blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS, :16].tobytes()


@dataclass
class Harness:
    scheduler: Scheduler
    rank: HashChainRank
    finished: list[Sequence] = field(default_factory=list)
    max_running: int = 0
    store: StoreStats | None = None

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert not step.plan.empty or not self.scheduler.num_running, "a step must move something"
        self.scheduler.apply(step, self.rank.run(step.plan))
        self.scheduler.blocks.check()
        self.max_running = max(self.max_running, self.scheduler.num_running)
        for sequence, work in [
            *zip(step.decodes, step.plan.decodes, strict=True),
            *zip(step.prefills, step.plan.prefills, strict=True),
        ]:
            self.check_kv(sequence)
            if work.sample:
                self.sample(sequence)

    def check_kv(self, sequence: Sequence) -> None:
        kv = b""
        for position in range(sequence.computed):
            kv = digest(kv, sequence.tokens[position])
            assert self.rank.kv(sequence.blocks, position) == kv, f"wrong KV at {position}"

    def sample(self, sequence: Sequence) -> None:
        kv = self.rank.kv(sequence.blocks, len(sequence.tokens) - 1)
        forks = []
        params = sequence.request.params
        if params.n > 1 and not sequence.choice and len(sequence.tokens) == sequence.prompt_length:
            forks = self.scheduler.fork(sequence, params.n)
        for each in [sequence, *forks]:
            each.tokens.append(next_token(kv, each.choice))
            if each.remaining_tokens == 0:
                self.scheduler.finish(each)
                self.finished.append(each)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@dataclass(frozen=True)
class Case:
    prompts: list[list[int]]
    max_tokens: int
    choices: int
    blocks: int
    host_blocks: int
    disk: bool
    batch_tokens: int
    sequences: int
    miss_rate: float
    whole: bool | None
    """Of the plan that the store follows; None: it follows none."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shared = draw(st.lists(st.integers(0, VOCAB - 1), min_size=0, max_size=20))
    tails = draw(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=10))
    cuts = draw(st.lists(st.integers(0, len(shared)), min_size=len(tails), max_size=len(tails)))
    prompts = [shared[:cut] + tail for cut, tail in zip(cuts, tails, strict=True)]
    max_tokens = draw(st.integers(1, 14))
    longest = max(len(prompt) for prompt in prompts) + max_tokens
    return Case(
        prompts=prompts,
        max_tokens=max_tokens,
        choices=draw(st.sampled_from([1, 1, 3])),
        blocks=-(-longest // BLOCK_TOKENS) + draw(st.integers(0, 12)),
        host_blocks=draw(st.sampled_from([0, 3, 40])),
        disk=draw(st.booleans()),
        batch_tokens=draw(st.sampled_from([1, 3, 16, 200])),
        sequences=draw(st.sampled_from([1, 3, 64])),
        miss_rate=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        whole=draw(st.sampled_from([None, False, True])),
    )


def run(case: Case, directory: Path) -> Harness:
    block_bytes = BLOCK_TOKENS * SLOT_BYTES
    disk_bytes = (4 << 20) if case.disk else 0
    host_bytes = case.host_blocks * (block_bytes + 4096)
    store = None
    if host_bytes or disk_bytes:
        store = BlockStore.open(
            StoreConfig(block_bytes, IDENTITY, host_bytes, disk_bytes, directory if case.disk else None)
        )
        if case.whole is not None:
            store.follow(JobPlan(whole=case.whole))
    config = SchedulerConfig(case.batch_tokens, case.sequences)
    scheduler = Scheduler(config, BlockManager(case.blocks, BLOCK_TOKENS), store, IDENTITY.root())
    pool = np.full((case.blocks, BLOCK_TOKENS, SLOT_BYTES), 0xDD, np.uint8)
    harness = Harness(scheduler, HashChainRank(store, pool, case.miss_rate))
    try:
        for number, prompt in enumerate(case.prompts):
            params = SamplingParams(max_tokens=case.max_tokens, n=case.choices)
            scheduler.add(Sequence(Request(number, tuple(prompt), params, number), 0, list(prompt)))
        for _ in range(20_000):
            if not scheduler.num_running and not scheduler.num_waiting:
                break
            harness.step()
        assert not scheduler.num_running
        assert not scheduler.num_waiting, "sequences were left behind"
        assert scheduler.blocks.used == 0
        if store is not None:
            harness.store = store.stats()
            uses = store._parts.uses
            assert not uses._expected, "whoever was preempted came back"
            assert uses.plan is None or uses.plan.position == len(case.prompts), "every line has begun"
    finally:
        if store is not None:
            store.close()
    return harness


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_every_sequence_ends_as_it_would_alone(case: Case, directory: Path) -> None:
    harness = run(case, directory)
    expected = {
        (number, choice): alone(prompt, case.max_tokens, choice)
        for number, prompt in enumerate(case.prompts)
        for choice in range(case.choices)
    }
    assert {(each.request.id, each.choice): each.tokens for each in harness.finished} == expected
    stats = harness.scheduler.stats
    assert stats.prompt_tokens == sum(len(prompt) for prompt in case.prompts)
    assert 0 <= stats.reused_tokens <= stats.prompt_tokens


def shared_document(**changes: object) -> Case:
    document = [number % VOCAB for number in range(40)]
    values: dict[str, object] = {
        "prompts": [[*document, number % VOCAB, number // VOCAB] for number in range(12)],
        "max_tokens": 6,
        "choices": 1,
        "blocks": 200,
        "host_blocks": 0,
        "disk": False,
        "batch_tokens": 64,
        "sequences": 64,
        "miss_rate": 0.0,
        "whole": None,
    }
    return Case(**(values | changes))


def test_a_shared_document_is_computed_once(directory: Path) -> None:
    harness = run(shared_document(), directory)
    stats = harness.scheduler.stats
    assert stats.reused_tokens == 11 * 40
    assert stats.step_tokens == stats.prompt_tokens - stats.reused_tokens + 12 * 5


@pytest.mark.parametrize("whole", [None, False, True])
def test_preemption_brings_kv_back_instead_of_computing_it_again(directory: Path, whole: bool | None) -> None:
    prompts = [[number % VOCAB, *([number // VOCAB] * 7)] for number in range(10)]
    case = shared_document(prompts=prompts, max_tokens=100, blocks=40, host_blocks=400, whole=whole)
    harness = run(case, directory)
    stats = harness.scheduler.stats
    assert stats.preemptions > 0
    assert stats.step_tokens == stats.prompt_tokens - stats.reused_tokens + 10 * 99, "no token is computed twice"


def test_under_a_whole_plan_only_what_will_be_read_again_is_stored(directory: Path) -> None:
    """One line at a time through a pool of two lines, and none has a block that another one needs."""
    prompts = [[(number + at) % VOCAB for at in range(20)] for number in range(VOCAB)]
    changes = {"prompts": prompts, "blocks": 14, "host_blocks": 400, "sequences": 1}
    without = run(shared_document(**changes), directory).store
    planned = run(shared_document(**changes, whole=True), directory).store
    assert without is not None
    assert planned is not None
    assert (without.puts > 15, without.spared) == (True, 0)
    assert (planned.puts, planned.spared > 15) == (0, True)


@pytest.mark.parametrize("whole", [None, False, True])
def test_what_gives_way_in_a_step_is_found_by_those_who_begin_in_it(directory: Path, whole: bool | None) -> None:
    """Six documents, asked about in turn by many at once; the host holds all of them: each is computed once."""
    documents = [[*([number % VOCAB, number // VOCAB] * 2), *range(4)] * 5 for number in range(6)]
    prompts = [[*documents[number % 6], number % VOCAB, number // VOCAB] for number in range(30)]
    case = shared_document(prompts=prompts, blocks=40, host_blocks=400, batch_tokens=500, whole=whole)
    assert run(case, directory).scheduler.stats.reused_tokens == 24 * 40


def test_a_plan_keeps_what_is_asked_for_in_turn(directory: Path) -> None:
    """Six documents, asked about in turn; device and host together hold half of them. The worst case for recency."""
    documents = [[*([number % VOCAB, number // VOCAB] * 2), *range(4)] * 5 for number in range(6)]
    prompts = [[*documents[number % 6], number % VOCAB, number // VOCAB] for number in range(30)]
    changes = {"prompts": prompts, "blocks": 13, "host_blocks": 20, "sequences": 1, "batch_tokens": 500}
    recency = run(shared_document(**changes), directory)
    planned = run(shared_document(**changes, whole=True), directory)
    assert recency.scheduler.stats.reused_tokens == 0
    assert planned.scheduler.stats.reused_tokens > 0.25 * planned.scheduler.stats.prompt_tokens
    assert recency.store is not None
    assert planned.store is not None
    assert planned.store.puts < recency.store.puts


def test_without_a_tier_preemption_computes_again_and_nothing_is_lost(directory: Path) -> None:
    prompts = [[number % VOCAB, *([number // VOCAB] * 7)] for number in range(10)]
    case = shared_document(prompts=prompts, max_tokens=100, blocks=40)
    harness = run(case, directory)
    assert harness.scheduler.stats.preemptions > 0
    assert len(harness.finished) == 10


def test_choices_share_the_prompt_until_they_write(directory: Path) -> None:
    case = shared_document(prompts=[[1, 2, 3, 4, 0, 1, 2, 3, 4, 0]], choices=3, max_tokens=5, blocks=30)
    harness = run(case, directory)
    assert harness.scheduler.stats.step_tokens == 10 + 3 * 4
    assert sorted(each.choice for each in harness.finished) == [0, 1, 2]


def test_the_pool_wastes_little_on_mixed_lengths(directory: Path) -> None:
    prompts = [[(number * 7 + at) % VOCAB for at in range(40 + 37 * (number % 9))] for number in range(24)]
    harness = run(shared_document(prompts=prompts, max_tokens=16, blocks=3000), directory)
    assert harness.scheduler.stats.waste_share < 0.04
