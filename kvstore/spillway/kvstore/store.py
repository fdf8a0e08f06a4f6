"""The store: what a rank calls. It joins host memory, lower tiers, an index and a plan, and hides all their trouble."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType

from .assembly import Parts, assemble
from .buffers import Buffer, Bytes, readable, writable
from .config import StoreConfig
from .errors import ConservationError, StoreClosedError
from .header import BlockHeader
from .identity import BlockHash
from .index.base import PEER, BlockIndex, Location
from .index.memory import MemoryIndex
from .outcomes import MissReason, StoreOutcome
from .peer.orders import Orders
from .peer.wire import Result
from .planning.follower import Follower
from .planning.job_plan import JobPlan
from .planning.prefetch import Prefetcher
from .stats import StoreStats
from .tiers.base import Tier
from .transfer.lane import Lane
from .transfer.reads import Priority, ReadQueue, ReadRequest

_log = logging.getLogger(__name__)

_Item = tuple[BlockHash, Bytes]


class BlockStore:
    """Verified, bounded storage of one rank's blocks. Thread-safe.

    Every put goes into host memory: the host tier, or a staging area where there is none. From there, cold blocks are
    written behind to disk, so that room can be made without waiting. Every get is verified, from wherever it comes.
    """

    def __init__(self, config: StoreConfig, parts: Parts) -> None:
        """Use `open`."""
        self.config = config
        self._parts = parts
        self._host = parts.host
        self._held = parts.held
        self._demotion = parts.demotion
        self._retains = config.host_bytes > 0
        self._prefetcher = Prefetcher(parts.uses, parts.held, parts.readers, self._takes, self._promote)
        self.following = self._follower()
        """Where the engine tells how its job goes on: see `follow`."""
        self._closed = False
        self._puts = self._put_drops = self._gets = self._hits = self._late = 0
        if parts.server is not None:
            lanes = [lane for lane in self._lanes() if lane.tier is parts.held or lane.tier in parts.own]
            parts.server.start(Orders(lanes, self._warm))

    @classmethod
    def open(cls, config: StoreConfig, index: BlockIndex | None = None, remote: Sequence[Tier] = ()) -> BlockStore:
        """Open a store; blocks that an earlier one left in ``disk_dir`` are there at once.

        ``index``: an embedded one by default; the store closes it. ``remote``: further tiers to load from. Raises
        `ConfigError` if a budget holds no block, and `MountError` (`MountBusyError`, `MountMismatchError`) if the disk
        directory cannot be had.
        """
        return cls(config, assemble(config, index or MemoryIndex(), remote))

    def put_many(self, blocks: Iterable[tuple[BlockHash, Buffer]]) -> list[bool]:
        """Take copies of blocks; each buffer may be reused at once. False where a block was dropped, which is counted.

        Waits up to ``deadlines.put_s`` in all if room must be made by writing to disk. Raises `BlockBufferError` for a
        buffer that is not contiguous or not ``block_bytes`` long, `StoreClosedError`.
        """
        self._require_open()
        items = [(block, readable(buffer, self.config.block_bytes)) for block, buffer in blocks]
        deadline = time.monotonic() + self.config.deadlines.put_s
        # Last block first: it is then the coldest, and a prefix is of use only from its beginning.
        kept = [self._put(block, raw, deadline) for block, raw in reversed(items)][::-1]
        self._puts += len(kept)
        self._put_drops += kept.count(False)
        self._demotion.keep_room(len(kept))
        return kept

    def get_many(self, blocks: Iterable[tuple[BlockHash, Buffer]]) -> list[bool]:
        """Load blocks into the callers' buffers. False for a miss: that buffer's bytes are then unspecified.

        True means: header, identity, length and checksum were verified. Returns within ``deadlines.load_s`` plus the
        time the bytes take at ``deadlines.slowest_bytes_s``, and writes into no buffer after that. Raises
        `BlockBufferError` for a buffer that is not contiguous, writable and ``block_bytes`` long, `StoreClosedError`.
        """
        self._require_open()
        items = [(block, writable(buffer, self.config.block_bytes)) for block, buffer in blocks]
        found = [self._get_from_host(block, out) for block, out in reversed(items)][::-1]
        self._prefetcher.delivered([block for (block, _), hit in zip(items, found, strict=True) if hit])
        in_host = found.count(True)
        for reader in self._parts.readers:
            rest = [position for position, hit in enumerate(found) if not hit]
            if not rest:
                break
            for position, hit in zip(rest, self._get_from(reader, [items[p] for p in rest]), strict=True):
                found[position] = hit
        self._gets += len(found)
        self._hits += found.count(True)
        if self._retains and self._parts.uses.plan is not None:
            self._late += found.count(True) - in_host
        return found

    def match(self, blocks: Sequence[BlockHash]) -> int:
        """How many leading ``blocks`` some working tier holds; no promise that they stay.

        No block is read. An index that nodes share is asked about those that this node has not: one round trip.
        """
        self._require_open()
        return self._parts.index.longest_prefix(blocks, self._working_tiers())

    def contains(self, block: BlockHash) -> bool:
        """Whether some working tier of this node holds ``block``. No I/O, nor a word to other nodes; no promise."""
        self._require_open()
        return self._parts.index.longest_prefix((block,), [name for name in self._working_tiers() if name != PEER]) == 1

    def locate(self, block: BlockHash) -> tuple[Location, ...]:
        """Every tier that holds ``block``, nearest first, working or not."""
        self._require_open()
        return self._parts.index.locate((block,))[0]

    def prefetch(self, blocks: Sequence[BlockHash]) -> None:
        """Hint that ``blocks`` are needed soon: those below host memory are copied to it, after all urgent loads."""
        self._require_open()
        if self._retains:
            self._prefetcher.fetch(blocks, time.monotonic() + self.config.deadlines.load_s)

    def follow(self, plan: JobPlan | None) -> Follower:
        """Evict, write and prefetch by ``plan``; None: by recency alone. Returns `following`, for the engine's thread.

        The engine tells it of every line that comes and begins, and of every block that the device takes and lets go
        of. Under a plan, a block that is loaded from disk for the device is not copied to host memory on the way.
        """
        self._require_open()
        self._parts.uses.begin(plan)
        self._prefetcher.restart()
        self.following.rekey_all()
        self.following.advance(0)
        return self.following

    def flush(self) -> bool:
        """Write what only host memory holds to disk; whether all of it was written within ``deadlines.flush_s``."""
        self._require_open()
        return self._demotion.flush(time.monotonic() + self.config.deadlines.flush_s)

    @property
    def peer_address(self) -> str:
        """Where peers reach this node's blocks, ``host:port``; empty if it serves nobody."""
        return self._parts.server.address if self._parts.server else ""

    def stats(self) -> StoreStats:
        """Counters and fill of every tier."""
        return StoreStats(
            tiers={lane.tier.name: lane.stats() for lane in self._lanes()},
            puts=self._puts,
            put_drops=self._put_drops,
            gets=self._gets,
            hits=self._hits,
            misses=self._gets - self._hits,
            prefetches=dict(self._prefetcher.outcomes),
            queued_writes=self._demotion.pending,
            queued_reads=sum(reader.queued for reader in self._parts.readers),
            served=self._parts.server.outcomes if self._parts.server else {},
            index=self._parts.index.stats(),
            spared=self.following.spared,
            prefetch_hits=self._prefetcher.hits,
            late_loads=self._late,
        )

    def check(self) -> None:
        """Raise `ConservationError` if a slot is lost or counted twice, a budget exceeded, or the index disagrees."""
        for lane in self._lanes():
            lane.tier.check()
            usage = lane.tier.usage()
            if usage.allocated_bytes > usage.budget_bytes:
                raise ConservationError(f"{lane.tier.name}: {usage.allocated_bytes} bytes exceed {usage.budget_bytes}")

    def close(self) -> None:
        """Write what is worth keeping to disk and let go of everything. Closing twice is harmless."""
        if self._closed:
            return
        if not self.flush():
            _log.warning("the store closes with %d blocks unwritten", self._demotion.pending)
        self._closed = True
        self._prefetcher.restart()
        patience_s = self.config.deadlines.close_s
        stopped = [self._demotion.close(patience_s), *(reader.close(patience_s) for reader in self._parts.readers)]
        if self._parts.server is not None:
            stopped.append(self._parts.server.close(patience_s))
        if not all(stopped):
            # A thread stuck in the device still uses our memory and files; the process's end will take them from it.
            _log.warning("a disk operation did not end: memory and files stay open until the process ends")
            return
        for lane in self._lanes():
            lane.tier.close()
        self._parts.index.close()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, block: BlockHash, raw: Bytes, deadline: float) -> bool:
        if not self._retains and self._is_below(block):
            return True
        if self._held.touch(block):
            return True
        outcome = StoreOutcome.NOT_NEEDED if self._is_needed_least(block) else self._host.put(block, raw)
        while outcome is StoreOutcome.FULL:
            hopeful = self._demotion.make_room(deadline)
            outcome = self._host.put(block, raw)
            if not hopeful:
                break
        if not outcome.held:
            self._host.counters.drop(outcome)
        return outcome.held

    def _is_needed_least(self, block: BlockHash) -> bool:
        """Whether, by the plan, a full host tier should keep what it has instead, and the disk need not have it."""
        policy = self._parts.policies[0]
        if self._parts.uses.plan is None:
            return False
        if len(self._parts.policies) > 1 and policy.worth_keeping(block) and not self._is_below(block):
            return False
        return not self._takes(block)

    def _is_below(self, block: BlockHash) -> bool:
        """Whether a tier of this node below host memory has ``block``."""
        return any(tier.contains(block) for tier in self._parts.own)

    def _get_from_host(self, block: BlockHash, out: Bytes) -> bool:
        start = time.perf_counter()
        failure = self._host.load(block, out)
        if failure is None:
            self._host.counters.hit(out.nbytes, time.perf_counter() - start)
            return True
        self._host.counters.miss(failure)
        return False

    def _get_from(self, reader: ReadQueue, items: list[_Item]) -> list[bool]:
        """Load from one lower tier what is there, in parallel, each block into its own buffer."""
        lane = reader.lane
        results: list[MissReason | None] = [MissReason.ABSENT] * len(items)
        there = [position for position, held in enumerate(reader.holds([block for block, _ in items])) if held]
        if there and not lane.breaker.allow():
            for position in there:
                results[position] = MissReason.BREAKER
        elif there:
            deadlines = self.config.deadlines
            seconds = deadlines.load_s + len(there) * self.config.block_bytes / deadlines.slowest_bytes_s
            ended = partial(self._loaded, lane)
            requests = [ReadRequest(items[p][0], partial(self._deliver, lane, items[p][1]), ended) for p in there]
            answers = reader.submit(requests, Priority.LOAD, time.monotonic() + seconds).wait()
            for position, result in zip(there, answers, strict=True):
                results[position] = result
            if MissReason.DEADLINE in answers:
                lane.breaker.failure()
        for result in results:
            if result is not None:
                lane.counters.miss(result)
        return [result is None for result in results]

    def _loaded(self, lane: Lane, result: MissReason | None, seconds: float) -> None:
        if result is None:
            lane.counters.hit(self.config.block_bytes, seconds)

    def _deliver(self, lane: Lane, out: Bytes, header: BlockHeader, stored: Bytes) -> MissReason | None:
        failure = lane.unseal(header, stored, out)
        if failure is None and self._retains and (self._parts.uses.plan is None or lane.tier not in self._parts.own):
            self._promote(lane, header, stored)
        return failure

    def _promote(self, lane: Lane, header: BlockHeader, stored: Bytes) -> bool:
        """Copy a block from a lower tier to host memory too, if room can be had at once from a block needed later."""
        return self._takes(header.block) and self._host.put_stored(header, stored, lane.sealer).held

    def _takes(self, block: BlockHash) -> bool:
        """Whether host memory has room for ``block``, or something that is needed later."""
        if self._held.free_slots:
            return True
        coldest = self._held.coldest(1)
        return not coldest or self._parts.policies[0].sooner(block, coldest[0])

    def _warm(self, blocks: Sequence[BlockHash]) -> list[Result]:
        """Prefetch ``blocks`` on somebody's order; which are in host memory, or may come to be."""
        if not self._retains:
            return [Result.FAILED] * len(blocks)
        below = [any(held) for held in zip(*(reader.holds(blocks) for reader in self._parts.readers), strict=True)]
        below = below or [False] * len(blocks)
        self.prefetch([block for block, held in zip(blocks, below, strict=True) if held])
        return [
            Result.DONE if self._held.contains(block) else Result.PENDING if held else Result.ABSENT
            for block, held in zip(blocks, below, strict=True)
        ]

    def _follower(self) -> Follower:
        prefetcher = self._prefetcher if self._retains else None
        held = self._held.contains if self._retains else self.contains
        return Follower(self._parts.uses, self._parts.policies, prefetcher, held, self.contains)

    def _lanes(self) -> list[Lane]:
        return [self._host, *(reader.lane for reader in self._parts.readers)]

    def _working_tiers(self) -> list[str]:
        return [lane.tier.name for lane in self._lanes() if lane.breaker.available]

    def _require_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed")
