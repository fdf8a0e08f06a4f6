"""Loads from a tier below host memory: a queue by priority, a few threads, a deadline per batch.

A read lands in a buffer of ours, is verified there, and is copied to the caller only if the caller still waits for
it, so a read that comes back late can never write into memory that its owner has put to another use.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ..buffers import Bytes, ThreadBuffer
from ..identity import BlockHash
from ..sealing import BlockHeader, MissReason
from .lane import Lane

Deliver = Callable[[BlockHeader, Bytes], None]
"""Takes a verified block from the reader's buffer, which is reused after it returns."""


class Priority(IntEnum):
    """Which loads go first."""

    LOAD = 0
    PREFETCH = 1


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """One block to load and where it goes."""

    block: BlockHash
    deliver: Deliver


class ReadBatch:
    """Loads that were asked for together. ``results[i]`` is None for a delivered block, else why there is none."""

    def __init__(self, requests: Sequence[ReadRequest]) -> None:
        self.requests = requests
        self.results: list[MissReason | None] = [MissReason.DEADLINE] * len(requests)
        self._open = True
        self._unfinished = len(requests)
        self._delivering = 0
        self._changed = threading.Condition()

    @property
    def open(self) -> bool:
        """Whether anybody still wants the blocks."""
        return self._open

    def wait(self, deadline: float) -> list[MissReason | None]:
        """The results once all are in, or at ``deadline`` (monotonic). Nothing is delivered after it returns."""
        with self._changed:
            self._changed.wait_for(lambda: self._unfinished == 0, max(0.0, deadline - time.monotonic()))
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

    def __init__(self, lane: Lane, buffer_bytes: int, threads: int) -> None:
        self._lane = lane
        self._buffer = ThreadBuffer(buffer_bytes)
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

    def submit(self, requests: Sequence[ReadRequest], priority: Priority) -> ReadBatch:
        """Queue loads. The batch's ``wait`` or ``cancel`` must be called."""
        batch = ReadBatch(requests)
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
                    for _, _, batch, position in self._heap:
                        batch.finish(position, MissReason.CANCELLED, claimed=False)
                    self._heap.clear()
                    return
                priority, _, batch, position = heapq.heappop(self._heap)
            try:
                self._serve(batch, position)
            finally:
                if priority is Priority.LOAD:
                    with self._changed:
                        self._urgent -= 1

    def _serve(self, batch: ReadBatch, position: int) -> None:
        request = batch.requests[position]
        if not batch.open:
            batch.finish(position, MissReason.CANCELLED, claimed=False)
            return
        start = time.perf_counter()
        answer = self._lane.load(request.block, self._buffer.bytes)
        if not isinstance(answer, BlockHeader):
            batch.finish(position, answer, claimed=False)
            return
        if not batch.claim():
            batch.finish(position, MissReason.DEADLINE, claimed=False)
            return
        result: MissReason | None = MissReason.CANCELLED
        try:
            request.deliver(answer, self._buffer.bytes)
            result = None
            self._lane.counters.hit(answer.raw_bytes, time.perf_counter() - start)
        finally:
            batch.finish(position, result, claimed=True)
