"""A tier together with what guards its use: how blocks are sealed for it, its breaker, its counters."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..buffers import Bytes, ThreadBuffer, round_up
from ..header import BlockHeader
from ..identity import BlockHash
from ..outcomes import MissReason, StoreOutcome
from ..sealing import Sealer
from ..stats import TierCounters, TierStats
from ..tiers.base import Tier
from .breaker import Breaker


@dataclass(slots=True)
class Lane:
    """How the store uses a tier: every load is verified here, and trouble trips the breaker.

    Loads count nothing: only the caller knows whether a block was delivered, and to whom. Thread-safe.
    """

    tier: Tier
    sealer: Sealer
    breaker: Breaker = field(default_factory=Breaker)
    counters: TierCounters = field(default_factory=TierCounters)
    _stored: ThreadBuffer = field(init=False)
    _raw: ThreadBuffer = field(init=False)

    def __post_init__(self) -> None:
        """Buffers for blocks that change their form; never touched, and so without memory, where none does."""
        self._stored = ThreadBuffer(round_up(self.sealer.stored_bytes))
        self._raw = ThreadBuffer(self.sealer.raw_bytes)

    def fetch(self, block: BlockHash, buffer: Bytes) -> BlockHeader | MissReason:
        """Load and verify a block's stored bytes into the start of ``buffer``; a damaged entry is withdrawn."""
        return self.judge(block, self.tier.load(block, buffer), buffer)

    def judge(self, block: BlockHash, answer: BlockHeader | MissReason, buffer: Bytes) -> BlockHeader | MissReason:
        """Verify what the tier loaded into ``buffer``; a damaged entry is withdrawn."""
        if isinstance(answer, BlockHeader):
            self.breaker.success()
            failure = self.sealer.verify(block, answer, buffer)
            if failure is None:
                return answer
            self.counters.unverified()
            answer = failure
        elif answer is MissReason.IO_ERROR:
            self.breaker.failure()
        if answer.damaged:
            self.tier.drop(block)
        return answer

    def unseal(self, header: BlockHeader, stored: Bytes, out: Bytes) -> MissReason | None:
        """Write the bytes of a fetched block into ``out``; None if that worked, else its entry is withdrawn."""
        failure = self.sealer.unseal(header, stored, out)
        if failure is not None:
            self.counters.unverified()
            self.tier.drop(header.block)
        return failure

    def load(self, block: BlockHash, out: Bytes) -> MissReason | None:
        """Load, verify and unseal a block into ``out``; None if that worked."""
        if self.sealer.plain:
            answer = self.fetch(block, out)
            return None if isinstance(answer, BlockHeader) else answer
        stored = self._stored.bytes
        answer = self.fetch(block, stored)
        return self.unseal(answer, stored, out) if isinstance(answer, BlockHeader) else answer

    def put(self, block: BlockHash, raw: Bytes) -> StoreOutcome:
        """Seal and store a block. A refusal is not counted, since the caller may try again."""
        if self.sealer.plain:
            return self._store(self.sealer.seal_plain(block, raw), raw)
        stored = self._stored.bytes
        return self._store(self.sealer.seal(block, raw, stored), stored)

    def put_stored(self, header: BlockHeader, stored: Bytes, origin: Sealer) -> StoreOutcome:
        """Store what ``origin`` sealed for another tier, as it is where the forms agree. A refusal is not counted.

        Where they differ the bytes are verified first, so that damage is never sealed under a fresh checksum.
        """
        if self.sealer.same_form(origin):
            return self._store(header, stored)
        raw = self._raw.bytes
        if origin.verify(header.block, header, stored) or origin.unseal(header, stored, raw):
            return StoreOutcome.DAMAGED
        return self.put(header.block, raw)

    def stats(self) -> TierStats:
        """The tier's figures now."""
        usage = self.tier.usage()
        loads, stores = self.counters.latencies()
        return TierStats(
            blocks=usage.used,
            bytes=usage.allocated_bytes,
            budget_bytes=usage.budget_bytes,
            foreign_blocks=usage.foreign,
            lost_slots=usage.lost,
            damaged=usage.damaged,
            hits=self.counters.hits,
            misses=dict(self.counters.misses),
            verify_failures=self.counters.verify_failures,
            stores=self.counters.stores,
            drops=dict(self.counters.drops),
            evictions=usage.evictions,
            foreign_evictions=usage.foreign_evictions,
            loaded_bytes=self.counters.loaded_bytes,
            stored_bytes=self.counters.stored_bytes,
            load_latency=loads,
            store_latency=stores,
            breaker=self.breaker.state,
            breaker_trips=self.breaker.trips,
        )

    def _store(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:
        if not self.breaker.allow():
            return StoreOutcome.BREAKER
        start = time.perf_counter()
        outcome = self.tier.store(header, stored)
        if outcome is StoreOutcome.STORED:
            self.breaker.success()
            self.counters.stored(header.stored_bytes, time.perf_counter() - start)
        elif outcome.trouble:
            self.breaker.failure()
        return outcome
