"""Blocks travel between pool and store unchanged, in place and through staging buffers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spillway.kvstore import BlockStore, KVIdentity, StoreConfig, block_hash
from spillway.node_agent import block_moves
from spillway.node_agent.block_moves import DirectMoves, StagedMoves

SHAPE = (2, 2, 2, 4, 8)
BLOCK_BYTES = 2 * 2 * 2 * 4 * 8 * 2
IDENTITY = KVIdentity("weights", "bfloat16", "none", 4, (0, 2), 0, 1, "positions")
NAMES = [block_hash(IDENTITY.root(), [number]) for number in range(10)]


@pytest.fixture
def store() -> Iterator[BlockStore]:
    opened = BlockStore.open(StoreConfig(BLOCK_BYTES, IDENTITY, host_bytes=1 << 20))
    yield opened
    opened.close()


def random_pool(seed: int) -> torch.Tensor:
    """Any bits, NaN included: a move is of bytes."""
    bits = torch.randint(0, 256, (12, *SHAPE[:-1], 16), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).view(torch.bfloat16)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("kind", [DirectMoves, StagedMoves])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_what_was_saved_is_loaded(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch, kind: type[DirectMoves] | type[StagedMoves], at_once: int
) -> None:
    monkeypatch.setattr(block_moves, "STAGING_BYTES", at_once * BLOCK_BYTES)
    source, target = random_pool(1), random_pool(2)
    before = target.clone()
    kind(source).save([(11 - number, NAMES[number]) for number in range(7)], store)
    wanted = [NAMES[9], *NAMES[:7]]
    places = [0, 5, 2, 9, 4, 7, 3, 11]
    assert kind(target).load(list(zip(wanted, places, strict=True)), store) == [False, *[True] * 7]
    for number, place in enumerate(places[1:]):
        assert same(target[place], source[11 - number])
    for untouched in {1, 6, 8, 10}:
        assert same(target[untouched], before[untouched])
