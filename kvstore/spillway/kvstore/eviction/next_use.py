"""Furthest next use first: what Belady's rule says when the future is known."""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

from ..identity import BlockHash
from ..planning.uses import NextUses, Use
from .base import EvictionPolicy

_Queue = OrderedDict[BlockHash, None]


class NextUse(EvictionPolicy):
    """Evicts by the job's plan (Belady 1966): first what no line needs any more, then what the plan does not know (by
    another policy's order), then what is needed furthest in the future.

    Blocks that the same line needs leave last block first, since a prefix is of use only from its beginning. It has a
    lock of its own, because `rekey` is called by the store and not by the tier.
    """

    def __init__(self, uses: NextUses, unplanned: EvictionPolicy) -> None:
        self._uses = uses
        self._unplanned = unplanned
        self._lock = threading.Lock()
        self._keys: dict[BlockHash, int | Use] = {}
        self._never: _Queue = OrderedDict()
        self._by_line: dict[int, _Queue] = {}

    def insert(self, block: BlockHash) -> None:
        """See `EvictionPolicy.insert`."""
        with self._lock:
            self._leave(block, evicted=False)
            self._enter(block, self._uses.next_use(block))

    def touch(self, block: BlockHash) -> None:
        """See `EvictionPolicy.touch`."""
        with self._lock:
            key = self._keys.get(block)
            if key is None:
                return
            now = self._uses.next_use(block)
            if now is Use.UNKNOWN and key is Use.UNKNOWN:
                self._unplanned.touch(block)
            elif now != key:
                self._leave(block, evicted=False)
                self._enter(block, now)

    def remove(self, block: BlockHash, *, evicted: bool) -> None:
        """See `EvictionPolicy.remove`."""
        with self._lock:
            self._leave(block, evicted=evicted)

    def coldest(self, limit: int) -> list[BlockHash]:
        """See `EvictionPolicy.coldest`."""
        with self._lock:
            order = list(islice(self._never, limit))
            if len(order) < limit:
                order += self._unplanned.coldest(limit - len(order))
            if len(order) < limit:
                for line in heapq.nlargest(limit - len(order), self._by_line):
                    order += islice(reversed(self._by_line[line]), limit - len(order))
                    if len(order) == limit:
                        break
            return order

    def worth_keeping(self, block: BlockHash) -> bool:
        """See `EvictionPolicy.worth_keeping`: not what the plan knows and needs no more."""
        return self._uses.next_use(block) is not Use.NEVER

    def sooner(self, block: BlockHash, other: BlockHash) -> bool:
        """Whether ``block`` may be needed before ``other``. Two that the plan does not know: yes, as the newer."""
        mine, others = self._uses.next_use(block), self._uses.next_use(other)
        if isinstance(mine, int):
            return not isinstance(others, int) or mine < others
        return mine is Use.UNKNOWN and not isinstance(others, int)

    def rekey(self, blocks: Iterable[BlockHash]) -> None:
        """The next use of ``blocks`` has changed; those not in the tier are ignored."""
        for block in blocks:
            self.touch(block)

    def blocks(self) -> list[BlockHash]:
        """Every block in the tier, in no order."""
        with self._lock:
            return list(self._keys)

    def _enter(self, block: BlockHash, key: int | Use) -> None:
        self._keys[block] = key
        if key is Use.UNKNOWN:
            self._unplanned.insert(block)
        elif key is Use.NEVER:
            self._never[block] = None
        else:
            self._by_line.setdefault(key, OrderedDict())[block] = None

    def _leave(self, block: BlockHash, *, evicted: bool) -> None:
        key = self._keys.pop(block, None)
        if key is None:
            return
        if key is Use.UNKNOWN:
            self._unplanned.remove(block, evicted=evicted)
        elif key is Use.NEVER:
            del self._never[block]
        else:
            queue = self._by_line[key]
            del queue[block]
            if not queue:
                del self._by_line[key]
