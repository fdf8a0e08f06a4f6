"""A tier together with what guards and counts its use."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..buffers import Bytes
from ..identity import BlockHash
from ..sealing import BlockHeader, Expected, MissReason, verify
from ..stats import TierCounters, TierStats
from ..tiers.base import StoreOutcome, Tier
from .breaker import Breaker

_TROUBLE = frozenset({StoreOutcome.IO_ERROR, StoreOutcome.SHORT_WRITE})


@dataclass(slots=True)
class Lane:
    """How the store uses a tier: every load is verified here, outcomes are counted, trouble trips the breaker."""

    tier: Tier
    identity: bytes
    raw_bytes: int
    breaker: Breaker = field(default_factory=Breaker)
    counters: TierCounters = field(default_factory=TierCounters)

    def load(self, block: BlockHash, out: Bytes) -> BlockHeader | MissReason:
        """Load and verify ``block`` into the start of ``out``; a damaged entry is withdrawn. The caller counts."""
        answer = self.tier.load(block, out)
        if isinstance(answer, BlockHeader):
            self.breaker.success()
            failure = verify(answer, out, Expected(block, self.identity, self.raw_bytes))
            if failure is None:
                return answer
            answer = failure
        elif answer is MissReason.IO_ERROR:
            self.breaker.failure()
        if answer.damaged:
            self.tier.drop(block)
        return answer

    def store(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:
        """Store a block; a refusal is counted as a drop."""
        outcome = self.offer(header, stored)
        if not outcome.held:
            self.counters.drop(outcome)
        return outcome

    def offer(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:
        """Store a block; a refusal is not counted, since the caller will try again or count it."""
        if not self.breaker.allow():
            return StoreOutcome.NOT_ACCEPTED
        start = time.perf_counter()
        outcome = self.tier.store(header, stored)
        if outcome is StoreOutcome.STORED:
            self.breaker.success()
            self.counters.stored(header.raw_bytes, time.perf_counter() - start)
        elif outcome in _TROUBLE:
            self.breaker.failure()
        return outcome

    def stats(self) -> TierStats:
        """The tier's figures now."""
        usage = self.tier.usage()
        loads, stores = self.counters.latencies()
        misses = dict(self.counters.misses)
        return TierStats(
            blocks=usage.used,
            bytes=usage.allocated_bytes,
            budget_bytes=usage.budget_bytes,
            foreign_blocks=usage.foreign,
            hits=self.counters.hits,
            misses=misses,
            verify_failures=sum(misses.get(reason, 0) for reason in _VERIFY),
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


_VERIFY = (MissReason.HEADER, MissReason.IDENTITY, MissReason.LENGTH, MissReason.CHECKSUM)
