"""Loads from a tier below host memory: a queue by priority, a few threads, a deadline per batch.

A read lands in a buffer of ours, is verified there, and is copied to the caller only if the caller still waits for it,
so a read that comes back late can never write into memory that its owner has put to another use.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from ..buffers import Bytes, ThreadBuffer, round_up
from ..header import BlockHeader
from ..identity import BlockHash
from ..outcomes import MissReason
from .lane import Lane

_log = logging.getLogger(__name__)

Deliver = Callable[[BlockHeader, Bytes], MissReason | None]
"""Takes a verified block from the reader's buffer, which is reused after it returns; None if that worked."""
Ended = Callable[[MissReason | None, float], None]
"""Told how a read that somebody still wanted ended, and after how many seconds of work. Must not wait."""
Fetch = Callable[[], BlockHeader | MissReason]
"""Loads and verifies a block into the calling thread's buffer."""


class Priority(IntEnum):
    """Which loads go first."""

    LOAD = 0
    PREFETCH = 1


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """One block to load, where it goes, and who is told."""

    block: BlockHash
    deliver: Deliver
    ended: Ended


class ReadBatch:
    """Loads that were asked for together. ``results[i]`` is None for a delivered block, else why there is none."""

    def __init__(self, requests: Sequence[ReadRequest], deadline: float) -> None:
        self.requests = requests
        self.deadline = deadline
        self.results: list[MissReason | None] = [MissReason.DEADLINE] * len(requests)
        self._open = True
        self._unfinished = len(requests)
        self._delivering = 0
        self._changed = threading.Condition()

    def pointless(self) -> MissReason | None:
        """Why it is not worth reading: nobody wants the blocks any more, or they cannot come in time. None if it is."""
        if not self._open:
            return MissReason.CANCELLED
        return MissReason.DEADLINE if time.monotonic() >= self.deadline else None

    def wait(self) -> list[MissReason | None]:
        """The results once all are in, or at the deadline. Nothing is delivered after it returns."""
        with self._changed:
            self._changed.wait_for(lambda: self._unfinished == 0, max(0.0, self.deadline - time.monotonic()))
            self._open = False
            self._changed.wait_for(lambda: self._delivering == 0)
            return list(self.results)

    def cancel(self) -> None:
        """Let go of what is not delivered yet: it ends as CANCELLED."""
        with self._changed:
            self._open = False

    def claim(self) -> bool:
        """A reader may deliver now; it must `finish` after. False if nobody waits any more."""
        with self._changed:
            self._delivering += self._open
            return self._open

    def finish(self, position: int, result: MissReason | None, *, claimed: bool) -> None:
        """Enter one result."""
        with self._changed:
            if claimed or self._open:
                self.results[position] = result
            self._delivering -= claimed
            self._unfinished -= 1
            if self._unfinished == 0 or not self._open:
                self._changed.notify_all()


class ReadQueue:
    """Threads that load from one lane. Requests of a higher priority go first, equal ones in order of arrival."""

    def __init__(self, lane: Lane, threads: int) -> None:
        self.lane = lane
        self._buffer = ThreadBuffer(round_up(lane.sealer.stored_bytes))
        self._heap: list[tuple[Priority, int, ReadBatch, int]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closing = False
        self._urgent = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"kv-read-{lane.tier.name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Requests no thread has taken yet."""
        return len(self._heap)

    @property
    def urgent(self) -> int:
        """Loads of `Priority.LOAD` that are queued or under way."""
        return self._urgent

    def holds(self, blocks: Sequence[BlockHash]) -> list[bool]:
        """Whether a load would find each block, as far as is known."""
        return [self.lane.tier.contains(block) for block in blocks]

    def submit(self, requests: Sequence[ReadRequest], priority: Priority, deadline: float) -> ReadBatch:
        """Queue loads that are worth nothing after ``deadline`` (monotonic). Use the batch's ``wait`` or ``cancel``."""
        batch = ReadBatch(requests, deadline)
        with self._changed:
            for position in range(len(requests)):
                heapq.heappush(self._heap, (priority, next(self._order), batch, position))
            if priority is Priority.LOAD:
                self._urgent += len(requests)
            self._changed.notify(len(requests))
        return batch

    def close(self, timeout_s: float) -> bool:
        """Stop; queued requests end undelivered. Whether every thread ended in time: a stuck device holds its own."""
        with self._changed:
            self._closing = True
            for _, _, batch, position in self._heap:
                batch.finish(position, MissReason.CANCELLED, claimed=False)
            self._heap.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._heap or self._closing)
                if self._closing:
                    return
                priority, _, batch, position = heapq.heappop(self._heap)
                positions = [position]
                while len(positions) < self._at_once(priority) and self._heap and self._heap[0][2] is batch:
                    positions.append(heapq.heappop(self._heap)[3])
            self._serve(batch, positions)
            if priority is Priority.LOAD:
                with self._changed:
                    self._urgent -= len(positions)

    def _at_once(self, priority: Priority) -> int:  # noqa: ARG002 - batches ask for more
        """How many requests of one batch a thread takes together."""
        return 1

    def _serve(self, batch: ReadBatch, positions: Sequence[int]) -> None:
        """Carry out requests that one thread took. Each is ended and finished, whatever happens."""
        for position in positions:
            start = time.perf_counter()
            block = batch.requests[position].block
            self._end(batch, position, start, partial(self.lane.fetch, block, self._buffer.bytes))

    def _end(self, batch: ReadBatch, position: int, start: float, fetch: Fetch) -> None:
        """Deliver what ``fetch`` brings into this thread's buffer, if somebody still wants it."""
        request = batch.requests[position]
        claimed = False
        result: MissReason | None = MissReason.INTERNAL
        try:
            answer = batch.pointless() or fetch()
            claimed = batch.claim()
            if not isinstance(answer, BlockHeader):
                result = answer
            else:
                result = request.deliver(answer, self._buffer.bytes) if claimed else MissReason.CANCELLED
        except Exception:  # noqa: BLE001 - a defect must cost one block, not the thread that all later loads need
            _log.exception("a load failed in an unforeseen way")
        finally:
            request.ended(result, time.perf_counter() - start)
            batch.finish(position, result, claimed=claimed)
