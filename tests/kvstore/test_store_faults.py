"""Whatever a tier does, the store returns right bytes or a miss, and every fault shows in the figures."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from kv_factories import BLOCK_BYTES, IDENTITY, blank, content, name, store_config

from spillway.kvstore import BlockStore, ConfigError, Faults
from spillway.kvstore.sealing import Sealer
from spillway.kvstore.tiers.faulty import FaultyTier

FAULTS = {
    "short_read": ("misses", "short_read"),
    "bit_flip": ("misses", "checksum"),
    "misplaced": ("misses", "header"),
    "io_error": ("drops", "io_error"),
    "full": ("drops", "no_space"),
}


def run(store: BlockStore, operations: int, seed: int) -> tuple[int, int]:
    """Put and get at random; blocks delivered, and blocks asked for."""
    rng = random.Random(seed)
    hits = asked = 0
    for _ in range(operations):
        numbers = rng.sample(range(40), 4)
        if rng.random() < 0.4:
            store.put_many([(name(number), content(number)) for number in numbers])
            continue
        outs = [blank() for _ in numbers]
        found = store.get_many([(name(number), out) for number, out in zip(numbers, outs, strict=True)])
        for number, out, hit in zip(numbers, outs, found, strict=True):
            assert not hit or np.array_equal(out, content(number)), f"wrong bytes for block {number}"
        asked += len(numbers)
        hits += sum(found)
    return hits, asked


def faulty_tier(store: BlockStore) -> FaultyTier:
    tier = store._parts.readers[0].lane.tier
    assert isinstance(tier, FaultyTier)
    return tier


@pytest.mark.parametrize("host", [0, 6])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_a_miss_and_is_counted(tmp_path: Path, fault: str, host: int) -> None:
    faults = Faults(seed=7, **{fault: 0.3})
    config = store_config(tmp_path, host=host, disk=24, disk_faults=faults)
    with BlockStore.open(config) as store:
        hits, _ = run(store, 150, seed=3)
        assert hits > 0
        struck = faulty_tier(store).struck[fault]
        assert struck > 5
        kind, counter = FAULTS[fault]
        disk = store.stats().tiers["disk"]
        assert getattr(disk, kind)[counter] > 0
        store.check()


def test_a_lost_block_is_a_miss(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path, disk=24, disk_faults=Faults(lost=1.0))) as store:
        store.put_many([(name(1), content(1))])
        assert store.flush()
        store._held.drop(name(1))
        assert store.get_many([(name(1), blank())]) == [False]
        assert not store.contains(name(1)), "it stayed findable"


def test_all_faults_at_once_and_a_healing(tmp_path: Path) -> None:
    faults = Faults(
        seed=11,
        delay=0.1,
        delay_s=0.002,
        short_read=0.05,
        bit_flip=0.1,
        lost=0.05,
        misplaced=0.05,
        full=0.05,
        io_error=0.03,
    )
    config = store_config(tmp_path, host=6, disk=24, disk_faults=faults)
    with BlockStore.open(config) as store:
        run(store, 300, seed=5)
        store.check()
        tier = faulty_tier(store)
        assert all(tier.struck[fault] for fault in ("delay", "short_read", "bit_flip", "lost", "full", "io_error"))
        figures = store.stats().tiers["disk"]
        assert figures.verify_failures >= figures.misses.get("checksum", 0) + figures.misses.get("header", 0) > 0
        tier.heal()
        before: Counter[str] = Counter(tier.struck)
        run(store, 50, seed=6)
        assert tier.struck == before
        store.check()


def test_the_same_seed_strikes_the_same(tmp_path: Path) -> None:
    class Nowhere:
        name = "nowhere"

    def strikes() -> list[bool]:
        tier = FaultyTier(Nowhere(), Faults(seed=5, full=0.5))
        return [tier._strikes("full") for _ in range(40)]

    assert strikes() == strikes()
    assert 5 < sum(strikes()) < 35


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_beyond_all_operations_are_refused(share: float) -> None:
    with pytest.raises(ConfigError):
        Faults(bit_flip=share)


def test_damage_in_host_memory_is_found_even_after_it_was_written_to_disk(tmp_path: Path) -> None:
    """The checksum is the put's, so a host page that goes bad is not sealed anew on its way down."""
    with BlockStore.open(store_config(tmp_path, host=8, disk=24)) as store:
        store.put_many([(name(1), content(1))])
        with store._held.pinned(name(1)) as held:
            held.padded[17] ^= 4
        assert store.flush()
        store._held.drop(name(1))
        assert store.get_many([(name(1), blank())]) == [False]
        assert store.stats().tiers["disk"].misses["checksum"] == 1


def test_damage_before_a_change_of_form_is_found_then(tmp_path: Path) -> None:
    """Where bytes are coded anew they are verified first, so that damage gets no fresh checksum."""
    with BlockStore.open(store_config(tmp_path, host=8, disk=24)) as store:
        store.put_many([(name(1), content(1))])
        lane = store._parts.readers[0].lane
        with store._held.pinned(name(1)) as held:
            held.padded[17] ^= 4
            origin = Sealer(IDENTITY.digest(), BLOCK_BYTES)
            lane.sealer.same_form = lambda other: False
            assert lane.put_stored(held.header, held.padded, origin) == "damaged"
