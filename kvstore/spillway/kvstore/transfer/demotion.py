"""How room is made in host memory: cold blocks are written to disk ahead of need, then leave at no cost."""

from __future__ import annotations

from collections.abc import Callable

from ..eviction.next_use import NextUse
from ..identity import BlockHash
from ..outcomes import StoreOutcome
from ..tiers.host import HostTier
from .lane import Lane
from .writes import WriteBehind

_CLEAN_SHARE = 8
"""One slot in this many of the host tier is kept free or clean (held by the disk as well), to be had at once."""
_SMALLEST_WINDOW = 8
"""Blocks that are kept clean at least, so that the writers have enough to do at once."""
_GIVE_UP_BLOCKS = 8


class Demotion:
    """Decides which blocks of host memory are written to disk, and which may leave it.

    ``retains``: host memory is a tier of its own, so only its cold end is written; else it is for staging, and all is.
    What a plan does not know is written while the disk keeps up, for those who come after the plan's lines. Nothing
    waits for that: where the disk does not keep up, such blocks leave unwritten, counted as drops.
    """

    def __init__(self, policy: NextUse, disk: Lane | None, *, retains: bool) -> None:
        self._policy = policy
        self._disk = disk
        self._retains = retains
        self._held: HostTier | None = None
        self._writes: WriteBehind | None = None
        self._window = 0
        self._puts = 0

    def start(self, host: Lane, held: HostTier, urgent: Callable[[], int], threads: int) -> None:
        """Begin: ``held`` is ``host``'s tier. Does nothing where there is no disk."""
        if self._disk is None:
            return
        total = held.usage().total
        self._window = min(total, max(_SMALLEST_WINDOW, total // _CLEAN_SHARE)) if self._retains else total
        self._held = held
        self._writes = WriteBehind(host, held, self._disk, urgent)
        self._writes.start(threads)

    @property
    def pending(self) -> int:
        """Blocks queued or being written."""
        return self._writes.pending if self._writes else 0

    def may_leave(self, block: BlockHash) -> bool:
        """Whether ``block`` may be evicted from host memory now; if so, it is. Called under the host tier's lock."""
        if not self._awaits_writing(block):
            return True
        if self._disk is not None and self._retains and self._policy.unplanned(block):
            self._disk.counters.drop(StoreOutcome.NOT_NEEDED)
            return True
        return False

    def keep_room(self, puts: int) -> None:
        """After ``puts`` blocks came in: write cold blocks, if enough came in since the last time to look again."""
        self._puts += puts
        if self._puts > self._window // 8:
            self._write_cold()

    def make_room(self, deadline: float) -> bool:
        """Wait until a block more may leave; False if none could by ``deadline`` (monotonic): then try once more.

        A host tier then gives up its coldest blocks, since what comes in is needed sooner; a staging area does not.
        """
        if self._writes is None or self._held is None:
            return False
        ended = self._writes.ended
        if not self._writes.pending:
            self._write_cold()
        if self._writes.wait_ended(ended, deadline):
            return True
        if self._retains:
            self._writes.give_up(self._held.coldest(_GIVE_UP_BLOCKS))
        return False

    def flush(self, deadline: float) -> bool:
        """Write everything that is worth keeping; False if it took longer than until ``deadline``."""
        if self._writes is None or self._held is None:
            return True
        self._writes.submit([block for block in self._held.coldest() if self._awaits_writing(block)])
        return self._writes.drain(deadline)

    def close(self, timeout_s: float) -> bool:
        """Stop writing. Whether every thread ended in time."""
        return self._writes.close(timeout_s) if self._writes else True

    def _write_cold(self) -> None:
        self._puts = 0
        if self._writes is not None and self._held is not None:
            lacking = self._window - self._held.free_slots
            if lacking > 0:
                self._writes.submit([b for b in self._held.coldest(lacking) if self._awaits_writing(b)])

    def _awaits_writing(self, block: BlockHash) -> bool:
        return (
            self._disk is not None
            and self._writes is not None
            and not self._disk.tier.contains(block)
            and not self._writes.refused(block)
            and self._disk.breaker.available
            and self._policy.worth_keeping(block)
        )
