"""What one caller does to a store: seeded operations on blocks, every delivered byte compared with the right one."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from spillway.kvstore import BlockHash, BlockStore, JobPlan, KVIdentity, block_hash

from .ledger import RESTING, Bytes, Counts, content

IDENTITY = KVIdentity("chaos", "float32", "none", 16, (0, 1), 0, 1, "rope")
BLOCK_BYTES = 8192
CHAINS = 96
CHAIN_BLOCKS = 48
_SHARED_BLOCKS = 16
"""Chains come in pairs that share so many first blocks."""
_AT_ONCE = 16

Chain = list[BlockHash]


def universe() -> list[Chain]:
    """All chains that workers use."""
    chains = []
    for number in range(CHAINS):
        parent, chain = IDENTITY.root(), []
        for depth in range(CHAIN_BLOCKS):
            parent = block_hash(parent, [number // 2 if depth < _SHARED_BLOCKS else CHAINS + number, depth])
            chain.append(parent)
        chains.append(chain)
    return chains


class Caller:
    """One thread's use of a store. Buffers rest under a pattern, so that a store that writes late is caught."""

    def __init__(self, store: BlockStore, chains: Sequence[Chain], seed: int) -> None:
        self._store = store
        self._chains = chains
        self._random = random.Random(seed)
        self._weights = [1 / (rank + 1) for rank in range(len(chains))]
        self._buffers = [np.full(BLOCK_BYTES, RESTING, np.uint8) for _ in range(_AT_ONCE)]
        self.counts = Counts()

    def work(self, seconds: float, most: int = 1 << 62) -> Counts:
        """Operate for ``seconds`` or until ``most`` blocks have been asked for, put or dropped."""
        until = time.monotonic() + seconds
        actions = (self._line, self._scattered, self._prefetch, self._drop, self._look, self._plan)
        while time.monotonic() < until and self.counts.operations < most:
            (action,) = self._random.choices(actions, (70, 10, 8, 3, 8, 1))
            try:
                action()
            except Exception as error:  # noqa: BLE001 - a store hides its tiers' troubles: whatever comes out is a finding
                self.counts.failures.append(f"{action.__name__}: {type(error).__name__}: {error}")
        self._inspect(self._buffers)
        return self.counts

    def read(self, blocks: Sequence[BlockHash]) -> list[bool]:
        """Get and verify ``blocks``; which came."""
        found: list[bool] = []
        for start in range(0, len(blocks), _AT_ONCE):
            found += self._get(blocks[start : start + _AT_ONCE])
        return found

    def write(self, blocks: Sequence[BlockHash]) -> list[bool]:
        """Put ``blocks``; which were kept."""
        start = time.perf_counter()
        kept = self._store.put_many([(block, content(block, BLOCK_BYTES)) for block in blocks])
        self.counts.slowest_put_s = max(self.counts.slowest_put_s, time.perf_counter() - start)
        self.counts.operations += len(blocks)
        self.counts.kept += kept.count(True)
        self.counts.not_kept += kept.count(False)
        return kept

    def _line(self) -> None:
        """As an engine: look for the longest prefix, load it, compute the rest, keep it."""
        chain = self._chain()
        chain = chain[: self._random.randrange(1, len(chain) + 1)]
        matched = self._store.match(chain)
        self.counts.operations += len(chain)
        self.counts.matched += matched
        found = self.read(chain[:matched])
        loaded = next((position for position, hit in enumerate(found) if not hit), matched)
        for start in range(loaded, len(chain), _AT_ONCE):
            self.write(chain[start : start + _AT_ONCE])

    def _scattered(self) -> None:
        self._get([self._random.choice(self._chain()) for _ in range(_AT_ONCE)])

    def _prefetch(self) -> None:
        chain = self._chain()[: self._random.randrange(1, _AT_ONCE)]
        self._store.prefetch(chain)
        self.counts.operations += len(chain)
        self.counts.prefetched += len(chain)

    def _drop(self) -> None:
        chain = self._chain()
        start = self._random.randrange(len(chain))
        blocks = chain[start : start + 4]
        for tier in (self._store._held, *self._store._parts.own):
            for block in blocks:
                self.counts.dropped += tier.drop(block)
        self.counts.operations += len(blocks)

    def _look(self) -> None:
        block = self._random.choice(self._chain())
        self._store.contains(block)
        self.counts.operations += 1

    def _plan(self) -> None:
        if self._random.random() < 0.5:
            self._store.follow(None)
            return
        plan = JobPlan([self._chain() for _ in range(20)], whole=self._random.random() < 0.5)
        self._store.follow(plan).advance(self._random.randrange(5))

    def _chain(self) -> Chain:
        (chain,) = self._random.choices(self._chains, self._weights)
        return chain

    def _get(self, blocks: Sequence[BlockHash]) -> list[bool]:
        buffers = self._buffers[: len(blocks)]
        self._inspect(buffers)
        start = time.perf_counter()
        found = self._store.get_many(list(zip(blocks, buffers, strict=True)))
        self.counts.slowest_get_s = max(self.counts.slowest_get_s, time.perf_counter() - start)
        for block, buffer, hit in zip(blocks, buffers, found, strict=True):
            if hit and not np.array_equal(buffer, content(block, BLOCK_BYTES)):
                self.counts.wrong += 1
            buffer.fill(RESTING)
        self.counts.operations += len(blocks)
        self.counts.hits += found.count(True)
        self.counts.misses += found.count(False)
        return found

    def _inspect(self, buffers: Sequence[Bytes]) -> None:
        for buffer in buffers:
            if (buffer != RESTING).any():
                self.counts.written_late += 1
                buffer.fill(RESTING)
