"""Furthest next use first: what Belady's rule says when the future is known."""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain, islice

from ..identity import BlockHash
from ..planning.uses import NextUses, Use
from .base import EvictionPolicy

_Queue = OrderedDict[BlockHash, None]
_ByDepth = list[tuple[int, BlockHash]]


class NextUse(EvictionPolicy):
    """Evicts by the job's plan (Belady 1966): first what nobody needs any more, then what the plan does not know (by
    another policy's order), then what is needed furthest in the future.

    A tier right below the device (``below_device``) gives up copies of what the device has before all that is of use:
    the device puts them again when it lets go of them (exclusive caching, Wong and Wilkes, USENIX ATC 2002).

    Blocks that the same line needs leave deepest first, since a prefix is of use only from its beginning. It has a
    lock of its own, because `rekey` is called by the store and not by the tier.
    """

    def __init__(self, uses: NextUses, unplanned: EvictionPolicy, *, below_device: bool = False) -> None:
        self._uses = uses
        self._below_device = below_device
        self._unplanned = unplanned
        self._lock = threading.Lock()
        self._places: dict[BlockHash, tuple[int | Use, int]] = {}
        self._useless: dict[Use, _Queue] = {Use.NEVER: OrderedDict(), Use.ON_DEVICE: OrderedDict()}
        self._by_line: dict[int, _ByDepth] = {}

    def insert(self, block: BlockHash) -> None:
        """See `EvictionPolicy.insert`."""
        with self._lock:
            self._leave(block, evicted=False)
            self._enter(block, self._key(block))

    def touch(self, block: BlockHash) -> None:
        """See `EvictionPolicy.touch`."""
        with self._lock:
            place = self._places.get(block)
            if place is not None and not self._rekey(block) and place[0] is Use.UNKNOWN:
                self._unplanned.touch(block)

    def remove(self, block: BlockHash, *, evicted: bool) -> None:
        """See `EvictionPolicy.remove`."""
        with self._lock:
            self._leave(block, evicted=evicted)

    def coldest(self, limit: int) -> list[BlockHash]:
        """See `EvictionPolicy.coldest`."""
        with self._lock:
            order = list(islice(chain.from_iterable(self._useless.values()), limit))
            if len(order) < limit:
                order += self._unplanned.coldest(limit - len(order))
            if len(order) < limit:
                for line in heapq.nlargest(limit - len(order), self._by_line):
                    order += (block for _, block in islice(reversed(self._by_line[line]), limit - len(order)))
                    if len(order) == limit:
                        break
            return order

    def worth_keeping(self, block: BlockHash) -> bool:
        """Whether ``block`` is to be written to a lower tier before it leaves.

        Not what nobody needs, nor a copy of what the device has: the device puts it again.
        """
        return self._key(block) not in (Use.NEVER, Use.ON_DEVICE)

    def unplanned(self, block: BlockHash) -> bool:
        """Whether there is a plan, and it cannot tell whether ``block`` will be needed."""
        return self._uses.plan is not None and self._uses.next_use(block) is Use.UNKNOWN

    def sooner(self, block: BlockHash, other: BlockHash) -> bool:
        """Whether ``block`` should leave after ``other``. Two that the plan does not know: yes, as the newer."""
        mine, others = self._key(block), self._key(other)
        if not isinstance(mine, int):
            return mine is Use.UNKNOWN and not isinstance(others, int)
        if not isinstance(others, int):
            return True
        return (mine, self._uses.depth(block)) < (others, self._uses.depth(other))

    def rekey(self, blocks: Iterable[BlockHash]) -> None:
        """The next use of ``blocks`` has changed; those not in the tier are ignored."""
        with self._lock:
            for block in blocks:
                if block in self._places:
                    self._rekey(block)

    def blocks(self) -> list[BlockHash]:
        """Every block in the tier, in no order."""
        with self._lock:
            return list(self._places)

    def _key(self, block: BlockHash) -> int | Use:
        key = self._uses.next_use(block)
        if self._below_device and isinstance(key, int) and self._uses.on_device(block):
            return Use.ON_DEVICE
        return key

    def _rekey(self, block: BlockHash) -> bool:
        """Put a block that is held where it belongs now; whether that is another place."""
        key, now = self._places[block][0], self._key(block)
        if now == key:
            return False
        self._leave(block, evicted=False)
        self._enter(block, now)
        return True

    def _enter(self, block: BlockHash, key: int | Use) -> None:
        depth = self._uses.depth(block)
        self._places[block] = key, depth
        if key is Use.UNKNOWN:
            self._unplanned.insert(block)
        elif isinstance(key, Use):
            self._useless[key][block] = None
        else:
            insort(self._by_line.setdefault(key, []), (depth, block))

    def _leave(self, block: BlockHash, *, evicted: bool) -> None:
        place = self._places.pop(block, None)
        if place is None:
            return
        key, depth = place
        if key is Use.UNKNOWN:
            self._unplanned.remove(block, evicted=evicted)
        elif isinstance(key, Use):
            del self._useless[key][block]
        else:
            blocks = self._by_line[key]
            del blocks[bisect_left(blocks, (depth, block))]
            if not blocks:
                del self._by_line[key]
