"""The store: what a rank calls. It joins a memory tier, a disk tier and an index, and hides all trouble of theirs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from .buffers import Buffer, Bytes, readable, round_up, writable
from .config import StoreConfig
from .errors import ConservationError, StoreClosedError
from .eviction.lru import LRU
from .identity import BlockHash
from .index.base import BlockIndex
from .index.memory import MemoryIndex
from .sealing import BlockHeader, MissReason, checksum_of
from .stats import StoreStats
from .tiers.base import StoreOutcome, TierIndex
from .tiers.disk.tier import DiskConfig, DiskTier
from .tiers.host import HostTier
from .tiers.slab import Slab
from .transfer.lane import Lane
from .transfer.reads import Priority, ReadQueue, ReadRequest
from .transfer.writes import WriteBehind

_log = logging.getLogger(__name__)

_CLEAN_SHARE = 8
"""One slot in this many of the host tier is kept free or clean (held by the disk as well), to be had at once."""
_GIVE_UP_BLOCKS = 8


class BlockStore:
    """Verified, bounded storage of one rank's blocks. Thread-safe.

    Every put goes into host memory: the host tier, or a staging area where there is none. From there, cold blocks are
    written behind to disk, so that room can be made without waiting. Every get is verified, from wherever it comes.
    """

    def __init__(self, config: StoreConfig, index: BlockIndex) -> None:
        """Use `open`, which also releases everything if a tier cannot be opened."""
        self.config = config
        self._identity = config.identity.digest()
        self._index = index
        self._retains = config.host_bytes > 0
        self._closed = False
        self._puts = self._put_drops = self._gets = self._hits = 0
        self._puts_since_scan = 0
        self._disk: Lane | None = None
        self._reads: ReadQueue | None = None
        self._writes: WriteBehind | None = None
        name, budget = ("host", config.host_bytes) if self._retains else ("staging", config.staging_bytes)
        slab = Slab(config.block_bytes, budget)
        self._policy = LRU()
        self._host_tier = HostTier(name, slab, self._policy, TierIndex(index, name), self._evictable)
        self._host = self._lane(self._host_tier)
        self._window = max(1, slab.total // _CLEAN_SHARE) if self._retains else slab.total
        if config.disk_dir is not None:
            self._open_disk(config.disk_dir)

    @classmethod
    def open(cls, config: StoreConfig) -> BlockStore:
        """Open a store; blocks that an earlier one left in ``disk_dir`` are there at once.

        Raises `ConfigError` if a budget holds no block, and `MountError` (`MountBusyError`, `MountMismatchError`) if
        the disk directory cannot be had.
        """
        return cls(config, MemoryIndex())

    def put_many(self, blocks: Iterable[tuple[BlockHash, Buffer]]) -> list[bool]:
        """Take copies of blocks; each buffer may be reused at once. False where a block was dropped, which is counted.

        Waits up to ``deadlines.put_s`` in all if room must be made by writing to disk. Raises `BlockBufferError` for a
        buffer that is not contiguous or not ``block_bytes`` long, `StoreClosedError`.
        """
        self._require_open()
        views = [(block, readable(buffer, self.config.block_bytes)) for block, buffer in blocks]
        deadline = time.monotonic() + self.config.deadlines.put_s
        kept = [self._put(block, view, deadline) for block, view in views]
        self._puts += len(kept)
        self._put_drops += kept.count(False)
        self._puts_since_scan += len(kept)
        if self._puts_since_scan > self._window // 8:
            self._write_cold_blocks()
        return kept

    def get_many(self, blocks: Iterable[tuple[BlockHash, Buffer]]) -> list[bool]:
        """Load blocks into the callers' buffers. False for a miss: that buffer's bytes are then unspecified.

        True means: header, identity, length and checksum were verified. Returns within ``deadlines.load_s`` plus the
        time the bytes take at ``deadlines.slowest_bytes_s``, and writes into no buffer after that. Raises
        `BlockBufferError` for a buffer that is not contiguous, writable and ``block_bytes`` long, `StoreClosedError`.
        """
        self._require_open()
        views = [(block, writable(buffer, self.config.block_bytes)) for block, buffer in blocks]
        found = [self._get_from_host(block, view) for block, view in views]
        rest = [position for position, hit in enumerate(found) if not hit]
        if rest:
            for position, hit in zip(rest, self._get_from_disk([views[position] for position in rest]), strict=True):
                found[position] = hit
        self._gets += len(found)
        self._hits += found.count(True)
        return found

    def match(self, blocks: Sequence[BlockHash]) -> int:
        """How many leading ``blocks`` some working tier holds. No I/O, and no promise that they stay."""
        self._require_open()
        return self._index.longest_prefix(blocks, self._working_tiers())

    def contains(self, block: BlockHash) -> bool:
        """Whether some working tier holds ``block``. No I/O, and no promise that it stays."""
        return self.match((block,)) == 1

    def prefetch(self, blocks: Sequence[BlockHash]) -> None:
        """Hint that ``blocks`` are needed soon: those on disk are copied to host memory, after all urgent loads."""
        self._require_open()
        if self._disk is None or self._reads is None or not self._retains or not self._disk.breaker.available:
            return
        wanted = [b for b in blocks if self._disk.tier.contains(b) and not self._host_tier.contains(b)]
        if wanted:
            self._reads.submit([ReadRequest(block, self._promote) for block in wanted], Priority.PREFETCH)

    def flush(self) -> bool:
        """Write what only host memory holds to disk; whether all of it was written within ``deadlines.flush_s``."""
        self._require_open()
        return self._flush()

    def stats(self) -> StoreStats:
        """Counters and fill of every tier."""
        lanes = [lane for lane in (self._host, self._disk) if lane is not None]
        return StoreStats(
            tiers={lane.tier.name: lane.stats() for lane in lanes},
            puts=self._puts,
            put_drops=self._put_drops,
            gets=self._gets,
            hits=self._hits,
            misses=self._gets - self._hits,
            queued_writes=self._writes.pending if self._writes else 0,
            queued_reads=self._reads.queued if self._reads else 0,
        )

    def check(self) -> None:
        """Raise `ConservationError` if a slot is lost or counted twice, a budget exceeded, or the index disagrees."""
        for lane in (self._host, self._disk):
            if lane is not None:
                lane.tier.check()
        usage = self._host_tier.usage()
        if usage.allocated_bytes > usage.budget_bytes:
            raise ConservationError(f"{usage.allocated_bytes} bytes of host memory exceed {usage.budget_bytes}")

    def close(self) -> None:
        """Write what is worth keeping to disk and let go of everything. Closing twice is harmless."""
        if self._closed:
            return
        flushed = self._flush()
        self._closed = True
        if not flushed:
            _log.warning("the store closes with %d blocks unwritten", self._writes.pending if self._writes else 0)
        stopped = [
            queue.close(self.config.deadlines.load_s) for queue in (self._writes, self._reads) if queue is not None
        ]
        if not all(stopped):
            # A thread stuck in the device still uses our memory and files; the process's end will take them from it.
            _log.warning("a disk operation did not end: memory and files stay open until the process ends")
            return
        self._host_tier.close()
        if self._disk is not None:
            self._disk.tier.close()
        self._index.close()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_disk(self, directory: Path) -> None:
        config = self.config
        disk = DiskConfig(
            directory=directory,
            budget_bytes=config.disk_bytes,
            stored_bytes=config.block_bytes,
            identity=config.identity,
            sharers=config.disk_sharers,
            free_floor_bytes=config.disk_free_floor_bytes,
        )
        self._disk = self._lane(DiskTier("disk", disk, LRU(), TierIndex(self._index, "disk")))
        self._reads = ReadQueue(self._disk, round_up(config.block_bytes), config.read_threads)
        reads = self._reads
        self._writes = WriteBehind(self._host_tier, self._disk, lambda: reads.urgent, config.write_threads)

    def _lane(self, tier: HostTier | DiskTier) -> Lane:
        return Lane(tier, self._identity, self.config.block_bytes)

    def _put(self, block: BlockHash, view: Bytes, deadline: float) -> bool:
        if self._host_tier.contains(block) or (not self._retains and self._disk and self._disk.tier.contains(block)):
            return True
        length = self.config.block_bytes
        header = BlockHeader(block, self._identity, length, length, checksum_of(view))
        outcome = self._host.offer(header, view)
        while outcome is StoreOutcome.FULL and self._writes is not None:
            ended = self._writes.ended
            self._write_cold_blocks()
            waited = self._writes.wait_ended(ended, deadline)
            if not waited and self._retains:
                self._writes.give_up(self._host_tier.all_blocks()[:_GIVE_UP_BLOCKS])
            outcome = self._host.offer(header, view)
            if not waited:
                break
        if not outcome.held:
            self._host.counters.drop(outcome)
        return outcome.held

    def _get_from_host(self, block: BlockHash, view: Bytes) -> bool:
        start = time.perf_counter()
        answer = self._host.load(block, view)
        if isinstance(answer, BlockHeader):
            self._host.counters.hit(answer.raw_bytes, time.perf_counter() - start)
            return True
        self._host.counters.miss(answer)
        return False

    def _get_from_disk(self, blocks: list[tuple[BlockHash, Bytes]]) -> list[bool]:
        """Load from disk what is there, in parallel, each block in its own buffer."""
        if self._disk is None or self._reads is None:
            return [False] * len(blocks)
        reasons: list[MissReason | None] = [MissReason.ABSENT] * len(blocks)
        there = [position for position, (block, _) in enumerate(blocks) if self._disk.tier.contains(block)]
        if there and not self._disk.breaker.allow():
            for position in there:
                reasons[position] = MissReason.BREAKER
        elif there:
            deadlines = self.config.deadlines
            seconds = deadlines.load_s + len(there) * self.config.block_bytes / deadlines.slowest_bytes_s
            deadline = time.monotonic() + seconds
            requests = [ReadRequest(blocks[p][0], partial(self._deliver, blocks[p][1])) for p in there]
            results = self._reads.submit(requests, Priority.LOAD).wait(deadline)
            for position, reason in zip(there, results, strict=True):
                reasons[position] = reason
            if MissReason.DEADLINE in results:
                self._disk.breaker.failure()
        for reason in reasons:
            if reason is not None:
                self._disk.counters.miss(reason)
        return [reason is None for reason in reasons]

    def _deliver(self, out: Bytes, header: BlockHeader, stored: Bytes) -> None:
        np.copyto(out, stored[: header.stored_bytes])
        if self._retains:
            self._promote(header, stored)

    def _promote(self, header: BlockHeader, stored: Bytes) -> None:
        """Copy a block that came from disk to host memory if room can be had at once; it stays on disk too."""
        self._host.offer(header, stored)

    def _evictable(self, block: BlockHash) -> bool:
        """Whether ``block`` may leave host memory now. Called under the host tier's lock."""
        if self._disk is None or self._writes is None:
            return True
        return (
            self._disk.tier.contains(block)
            or self._writes.refused(block)
            or not self._disk.breaker.available
            or not self._policy.worth_keeping(block)
        )

    def _write_cold_blocks(self) -> None:
        """Queue the coldest blocks that only host memory holds, so that room for the next puts costs no wait."""
        self._puts_since_scan = 0
        if self._writes is not None:
            self._writes.submit([b for b in self._host_tier.cold_blocks(self._window) if not self._evictable(b)])

    def _flush(self) -> bool:
        if self._writes is None:
            return True
        self._writes.submit([block for block in self._host_tier.all_blocks() if not self._evictable(block)])
        return self._writes.drain(time.monotonic() + self.config.deadlines.flush_s)

    def _working_tiers(self) -> tuple[str, ...]:
        if self._disk is None or not self._disk.breaker.available:
            return (self._host_tier.name,)
        return (self._host_tier.name, self._disk.tier.name)

    def _require_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed")
