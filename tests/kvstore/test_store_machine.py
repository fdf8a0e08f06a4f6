"""A store under any sequence of calls, restarts and damage: right bytes or a miss, and the books add up after each."""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_factories import IDENTITY, OTHER_IDENTITY, blank, content, name, store_config

from spillway.kvstore import BlockHash, BlockStore, JobPlan

NUMBERS = st.integers(0, 29)
BATCHES = st.lists(NUMBERS, min_size=1, max_size=6)
SIZES = [{"host": 8}, {"disk": 10}, {"host": 4, "disk": 12}, {"host": 10, "disk": 4}, {"host": 3, "disk": 60}]


class StoreMachine(RuleBasedStateMachine):
    """``planned``: the store follows a plan since it was opened, and may decline blocks that it does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="kv-machine-"))
        self.store: BlockStore
        self.identity = IDENTITY

    @initialize(size=st.sampled_from(SIZES), eviction=st.sampled_from(["lru", "arc"]))
    def open(self, size: dict[str, int], eviction: str) -> None:
        self.config = store_config(self.directory, **size, eviction=eviction)
        self.store = BlockStore.open(self.config)
        self.puts = self.gets = self.hits = 0
        self.planned = False

    @rule(numbers=BATCHES)
    def put(self, numbers: list[int]) -> None:
        kept = self.store.put_many([(name(n, self.identity), content(n)) for n in numbers])
        if not self.planned:
            assert kept == [True] * len(numbers), "dropped, although there was all the time to make room"
            assert self.store.contains(name(numbers[0], self.identity)), "the first of a batch is its warmest"
        self.puts += len(numbers)

    @rule(numbers=BATCHES)
    def get(self, numbers: list[int]) -> None:
        outs = [blank() for _ in numbers]
        names = [name(n, self.identity) for n in numbers]
        found = self.store.get_many(list(zip(names, outs, strict=True)))
        for number, out, hit in zip(numbers, outs, found, strict=True):
            assert not hit or np.array_equal(out, content(number))
        self.gets += len(numbers)
        self.hits += sum(found)

    def names(self, numbers: Iterable[int]) -> list[BlockHash]:
        return [name(number, self.identity) for number in numbers]

    @rule(numbers=BATCHES)
    def prefetch(self, numbers: list[int]) -> None:
        self.store.prefetch([name(n, self.identity) for n in numbers])

    @rule(lines=st.lists(BATCHES, max_size=5), whole=st.booleans())
    def follow(self, lines: list[list[int]], whole: bool) -> None:
        self.planned = True
        self.store.follow(JobPlan([self.names(dict.fromkeys(line)) for line in lines], whole=whole))

    @rule(line=BATCHES)
    def announce(self, line: list[int]) -> None:
        self.store.following.announce(self.names(dict.fromkeys(line)))

    @rule(numbers=BATCHES)
    def take(self, numbers: list[int]) -> None:
        self.store.following.took(self.names(numbers))

    @rule(number=NUMBERS)
    def let_go(self, number: int) -> None:
        block = name(number, self.identity)
        if self.store.following.lets_go(block):
            self.put([number])

    @rule(whole=st.booleans())
    def scatter(self, whole: bool) -> None:
        self.store.following.whole = whole

    @rule(position=st.integers(0, 6))
    def advance(self, position: int) -> None:
        self.store.following.advance(position)

    @rule(numbers=BATCHES)
    def expect(self, numbers: list[int]) -> None:
        self.store.following.expect(self.names(numbers))

    @rule(numbers=BATCHES)
    def meet(self, numbers: list[int]) -> None:
        self.store.following.met(self.names(numbers))

    @rule()
    def flush(self) -> None:
        assert self.store.flush()

    @precondition(lambda self: self.config.disk_dir)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = BlockStore.open(self.config)
        self.puts = self.gets = self.hits = 0
        self.planned = False

    @precondition(lambda self: self.config.disk_dir)
    @rule()
    def switch_model(self) -> None:
        self.store.close()
        self.identity = OTHER_IDENTITY if self.identity is IDENTITY else IDENTITY
        self.config = replace(self.config, identity=self.identity)
        self.store = BlockStore.open(self.config)
        self.puts = self.gets = self.hits = 0
        self.planned = False

    @precondition(lambda self: self.config.disk_dir)
    @rule(place=st.floats(0, 1, exclude_max=True), flips=st.binary(min_size=1, max_size=64))
    def damage_the_disk(self, place: float, flips: bytes) -> None:
        """Bytes change under the closed store: payload, header, floors or the segment's own page."""
        self.store.close()
        segments: Sequence[Path] = list(self.directory.rglob("segment-*.kv"))
        for path in segments[:1]:
            with path.open("r+b") as file:
                offset = int(place * path.stat().st_size)
                file.seek(offset)
                old = file.read(len(flips))
                file.seek(offset)
                file.write(bytes(a ^ b for a, b in zip(old, flips, strict=False)))
        self.store = BlockStore.open(self.config)
        self.puts = self.gets = self.hits = 0
        self.planned = False

    @invariant()
    def the_books_add_up(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check()
        stats = self.store.stats()
        assert (stats.puts, stats.gets, stats.hits) == (self.puts, self.gets, self.hits)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.directory)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
