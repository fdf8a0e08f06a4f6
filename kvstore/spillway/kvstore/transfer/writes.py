"""Write-behind: copying blocks from host memory to a lower tier without the caller waiting.

A block is written straight from its host slot, which is held in place meanwhile: the host tier itself is the staging
memory, and a block that is being written can still be loaded from it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from ..identity import BlockHash
from ..outcomes import StoreOutcome
from ..tiers.host import HostTier
from .lane import Lane

_log = logging.getLogger(__name__)

_GATE_S = 0.02
"""The longest a write waits for loads to go first, so that a steady stream of loads cannot stop writing."""


class WriteBehind:
    """Threads that write queued blocks of ``host`` to ``lane``. ``urgent`` tells how many loads should go first."""

    def __init__(self, host: Lane, held: HostTier, lane: Lane, urgent: Callable[[], int]) -> None:
        self._host = host
        self._held = held
        self._lane = lane
        self._urgent = urgent
        self._queue: deque[BlockHash] = deque()
        self._pending: set[BlockHash] = set()
        self._refused: set[BlockHash] = set()
        self._ended = 0
        self._changed = threading.Condition()
        self._closing = False
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        """Begin to write."""
        name = self._lane.tier.name
        for number in range(threads):
            thread = threading.Thread(target=self._run, name=f"kv-write-{name}-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def pending(self) -> int:
        """Blocks queued or being written."""
        return len(self._pending)

    @property
    def ended(self) -> int:
        """Writes that have ended, well or not."""
        return self._ended

    def submit(self, blocks: Iterable[BlockHash]) -> None:
        """Queue ``blocks`` that are not queued yet."""
        with self._changed:
            fresh = [block for block in blocks if block not in self._pending]
            self._pending.update(fresh)
            self._queue.extend(fresh)
            self._changed.notify(len(fresh))

    def wait_ended(self, since: int, deadline: float) -> bool:
        """Wait until more writes than ``since`` have ended; False at ``deadline`` (monotonic) or if none is queued."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended != since or not self._pending, max(0.0, deadline - time.monotonic())
            )
            return self._ended != since

    def refused(self, block: BlockHash) -> bool:
        """Whether ``block`` could not be written and may leave host memory without."""
        return block in self._refused

    def give_up(self, blocks: Iterable[BlockHash]) -> None:
        """Let ``blocks`` leave host memory unwritten: there was no time to write them. Counted as drops."""
        with self._changed:
            fresh = [block for block in blocks if block not in self._refused]
            self._refused.update(fresh)
        for _ in fresh:
            self._lane.counters.drop("write_behind")

    def drain(self, deadline: float) -> bool:
        """Wait until nothing is queued or being written; False at ``deadline``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, max(0.0, deadline - time.monotonic()))

    def close(self, timeout_s: float) -> bool:
        """Stop after the writes under way; queued ones are not begun. Whether every thread ended in time."""
        with self._changed:
            self._closing = True
            self._pending.difference_update(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                block = self._queue.popleft()
            outcome = StoreOutcome.NOT_ACCEPTED
            try:
                self._let_loads_go_first()
                outcome = self._write(block)
            except Exception:  # noqa: BLE001 - a defect must cost one block, not the thread that all later writes need
                _log.exception("a write failed in an unforeseen way")
                self._lane.counters.drop("internal")
            finally:
                with self._changed:
                    self._pending.discard(block)
                    self._ended += 1
                    if outcome.held:
                        self._refused.clear()
                    else:
                        self._refused.add(block)
                    self._changed.notify_all()

    def _write(self, block: BlockHash) -> StoreOutcome:
        with self._held.pinned(block, touch=False) as held:
            if held is None:
                return StoreOutcome.PRESENT
            outcome = self._lane.put_stored(held.header, held.padded, self._host.sealer)
        if not outcome.held:
            self._lane.counters.drop(outcome)
        if outcome is StoreOutcome.DAMAGED:
            self._held.drop(block)
        return outcome

    def _let_loads_go_first(self) -> None:
        until = time.monotonic() + _GATE_S
        while self._urgent() and time.monotonic() < until and not self._closing:
            time.sleep(0.001)
