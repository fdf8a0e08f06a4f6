"""What every tier does, whatever it stores blocks in. A new tier joins by one line in ``kv_factories.TIERS``."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kv_factories import BLOCK_BYTES, TIERS, TierBench, blank, content, header_of, name

from spillway.kvstore.header import BlockHeader
from spillway.kvstore.outcomes import MissReason, StoreOutcome

BLOCKS = 12


@pytest.fixture(params=TIERS)
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TierBench]:
    tier = TIERS[request.param](BLOCKS, tmp_path, monkeypatch)
    yield TierBench(tier)
    tier.check()
    tier.close()


def test_gives_back_what_was_stored(bench: TierBench) -> None:
    assert bench.store(1) is StoreOutcome.STORED
    assert bench.tier.contains(name(1))
    assert np.array_equal(bench.load(1), content(1))


def test_gives_back_the_header_it_was_given(bench: TierBench) -> None:
    header = header_of(1, content(1))
    bench.tier.store(header, content(1))
    assert bench.tier.load(name(1), blank()) == header


def test_what_was_never_stored_is_absent(bench: TierBench) -> None:
    assert bench.load(1) is MissReason.ABSENT
    assert not bench.tier.contains(name(1))


def test_the_buffer_may_be_reused_at_once(bench: TierBench) -> None:
    data = content(1)
    bench.store(1, data)
    data[:] = 0
    assert np.array_equal(bench.load(1), content(1))


def test_storing_twice_keeps_the_first(bench: TierBench) -> None:
    bench.store(1)
    assert bench.store(1) is StoreOutcome.PRESENT
    assert bench.tier.usage().used == 1


@pytest.mark.parametrize("offset", [0, 1, 512])
def test_buffers_may_lie_anywhere(bench: TierBench, offset: int) -> None:
    source = blank(2 * BLOCK_BYTES)[offset : offset + BLOCK_BYTES]
    source[:] = content(1)
    bench.store(1, source)
    out = blank(2 * BLOCK_BYTES)
    answer = bench.tier.load(name(1), out[offset : offset + BLOCK_BYTES])
    assert isinstance(answer, BlockHeader)
    assert np.array_equal(out[offset : offset + BLOCK_BYTES], content(1))
    assert (out[offset + BLOCK_BYTES :] == 0xEE).all(), "wrote past the block"
    assert (out[:offset] == 0xEE).all(), "wrote before the block"


def test_a_block_may_be_shorter_than_a_slot(bench: TierBench) -> None:
    short = content(1, 5000)
    bench.tier.store(header_of(1, short), short)
    assert np.array_equal(bench.load(1), short)


def test_a_dropped_block_is_absent(bench: TierBench) -> None:
    bench.store(1)
    assert bench.tier.drop(name(1))
    assert not bench.tier.drop(name(1))
    assert bench.load(1) is MissReason.ABSENT


def test_the_coldest_block_leaves_a_full_tier(bench: TierBench) -> None:
    total = 0
    while bench.tier.usage().evictions == 0:
        bench.load(0)
        bench.store(total)
        total += 1
        bench.tier.check()
    assert total - 1 >= BLOCKS // 2
    assert bench.load(1) is MissReason.ABSENT, "the coldest stayed"
    assert np.array_equal(bench.load(0), content(0)), "the warmest left"
    assert np.array_equal(bench.load(total - 1), content(total - 1))


def test_stays_within_its_budget(bench: TierBench) -> None:
    for number in range(5 * BLOCKS):
        bench.store(number)
        usage = bench.tier.usage()
        assert usage.allocated_bytes <= usage.budget_bytes
        assert usage.free + usage.used + usage.foreign + usage.pinned + usage.lost == usage.total
    assert usage.used <= BLOCKS


def test_every_byte_it_returns_under_contention_is_right(bench: TierBench) -> None:
    """Threads store, load and drop the same few blocks; a reader always sees one whole block or none."""
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            number = rng.randrange(2 * BLOCKS)
            action = rng.random()
            if action < 0.45:
                bench.store(number)
            elif action < 0.95:
                found = bench.load(number)
                if not isinstance(found, str) and not np.array_equal(found, content(number)):
                    wrong.append(number)
            else:
                bench.tier.drop(name(number))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    bench.tier.check()
    assert bench.tier.usage().pinned == 0
