"""The device pool's bookkeeping: which block holds what, who refers to it, which one goes next.

A block is in exactly one of three states. *Free*: no one refers to it and its bytes mean nothing. *Used*: one or more
sequences refer to it. *Cached*: no one refers to it, but its bytes are known by hash and can be taken up again; cached
blocks leave in least-recently-used order, those that were set aside before all others. ``free + used + cached`` is the
pool, always: ``check`` proves it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from spillway.kvstore import BlockHash


class BlockManager:
    """Owner of the pool's slots. It moves no bytes: callers turn its answers into plan entries."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._aside: OrderedDict[int, None] = OrderedDict()
        self._unspilled: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that ``allocate`` can hand out: free ones and cached ones."""
        return len(self._free) + self.cached

    @property
    def used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.num_blocks - self.available

    @property
    def free(self) -> int:
        """Blocks whose bytes mean nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks kept only because they may be wanted again."""
        return len(self._cached) + len(self._aside)

    def find(self, block_hash: BlockHash) -> int | None:
        """The block that holds this content, used or cached. Changes nothing."""
        return self._block_of.get(block_hash)

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of the longest prefix of a hash chain that the pool holds. Changes nothing."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def available_besides(self, blocks: Sequence[int]) -> int:
        """``available`` once these blocks (a ``match``) were acquired: cached ones among them cannot make room."""
        return self.available - sum(1 for block in blocks if self._refs[block] == 0)

    def refs(self, block: int) -> int:
        """How many sequences refer to the block; more than one means copy before writing."""
        return self._refs[block]

    def allocate(self) -> tuple[int, BlockHash | None]:
        """A block for new content, and the name of the cached content that gave way. Needs ``available > 0``."""
        if self._free:
            block, evicted = self._free.pop(), None
        else:
            block, _ = (self._aside or self._cached).popitem(last=False)
            evicted = self._forget(block)
        self._refs[block] = 1
        return block, evicted

    def acquire(self, block: int) -> None:
        """One more reference to a used or cached block."""
        if self._refs[block] == 0:
            del (self._aside if block in self._aside else self._cached)[block]
        self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a table. The tail goes first, so that it is also evicted first."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def set_aside(self, names: Sequence[BlockHash]) -> None:
        """Nobody is known to need these contents again: those that are cached go before all others, in this order."""
        for name in names:
            block = self._block_of.get(name)
            if block is not None and block in self._cached:
                del self._cached[block]
                self._aside[block] = None

    def bring_back(self, names: Sequence[BlockHash]) -> None:
        """Somebody needs these contents after all."""
        for name in reversed(names) if self._aside else ():
            block = self._block_of.get(name)
            if block is not None and block in self._aside:
                del self._aside[block]
                self._cached[block] = None

    def seal(self, block: int, block_hash: BlockHash, *, spilled: bool = False) -> int:
        """Name the content of a full block; from now on it can be found. Returns the block to refer to.

        When another block already holds the same content the caller's reference moves there (the bytes are the same),
        unless several sequences share the newcomer; then it simply stays nameless.
        """
        twin = self._block_of.get(block_hash)
        if twin == block:
            return block
        if twin is not None:
            if self._refs[block] > 1:
                return block
            self.acquire(twin)
            self.release([block])
            return twin
        self._hash_of[block] = block_hash
        self._block_of[block_hash] = block
        if not spilled:
            self._unspilled[block] = None
        return block

    def take_unspilled(self, limit: int) -> list[tuple[int, BlockHash]]:
        """Up to ``limit`` of the oldest sealed blocks that were never spilled; they count as spilled from now on."""
        taken: list[tuple[int, BlockHash]] = []
        while self._unspilled and len(taken) < limit:
            block, _ = self._unspilled.popitem(last=False)
            block_hash = self._hash_of[block]
            if block_hash is not None:
                taken.append((block, block_hash))
        return taken

    def contents(self) -> list[tuple[int, BlockHash]]:
        """Every block whose content has a name."""
        return [(block, name) for block, name in enumerate(self._hash_of) if name is not None]

    def _forget(self, block: int) -> BlockHash | None:
        block_hash = self._hash_of[block]
        self._hash_of[block] = None
        self._unspilled.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
        return block_hash

    def check(self) -> None:
        """Prove the books: every block is free, used or cached, and every name leads to its block.

        Raises:
            RuntimeError: an invariant is broken; the message says which.
        """
        free, cached = set(self._free), set(self._cached) | set(self._aside)
        if len(cached) != self.cached:
            raise RuntimeError("a block is cached and set aside")
        used = {block for block in range(self.num_blocks) if self._refs[block] > 0}
        if len(free) != len(self._free) or len(free) + len(cached) + len(used) != self.num_blocks:
            raise RuntimeError(f"pool of {self.num_blocks}: {len(free)} free, {len(cached)} cached, {len(used)} used")
        if free & cached or free & used or cached & used or any(count < 0 for count in self._refs):
            raise RuntimeError("a block is in two states, or its reference count is negative")
        named = {block for block, name in enumerate(self._hash_of) if name is not None}
        if set(self._block_of.values()) != named or len(self._block_of) != len(named) or named & free:
            raise RuntimeError("names and blocks disagree")
        if not cached <= named or not set(self._unspilled) <= named:
            raise RuntimeError("a cached or unspilled block has no name")
