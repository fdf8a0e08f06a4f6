"""The index that nodes share, in Redis: what this node has is known here at once, what others have by asking."""

from __future__ import annotations

import struct
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice, takewhile
from operator import itemgetter
from typing import Any

import xxhash

from ..identity import BlockHash
from .base import MOST_AT_ONCE, PEER, BlockIndex, IndexStats, Location
from .memory import MemoryIndex
from .near import NearCache
from .redis_client import RedisCalls, RedisConfig
from .redis_look_up import LOOK_UP, marks_of
from .redis_scripts import Keys
from .redis_writer import Writer

_PLACE = struct.Struct(">III")
_Places = tuple[Location, ...]
_Answer = tuple[list[Any], list[Any]]


class RedisIndex(BlockIndex):
    """Own tiers in memory, other nodes' in Redis. With Redis away own blocks are found as ever, others are misses."""

    def __init__(self, config: RedisConfig, identity: bytes, tiers: Sequence[str] = ("host", "disk")) -> None:
        """``identity``: digest of the blocks' identity, a namespace of its own. ``tiers``: those that others may use.

        Does not wait for Redis. Raises `ConfigError`.
        """
        self._config = config
        self._own = MemoryIndex(tiers)
        self._tiers = tuple(tiers)
        self._keys = Keys(config.prefix, identity.hex()[:32], config.buckets)
        self._start, self._leases = self._keys.of(""), self._keys.of("leases")
        self._calls = RedisCalls(config)
        self._near_places: NearCache[BlockHash, _Places] = NearCache(config.near_s, config.near_blocks)
        self._near_prefixes: NearCache[bytes, int] = NearCache(config.near_s, config.near_blocks)
        self._near_lock = threading.Lock()
        self._near_counts: Counter[str] = Counter()
        self._writer = Writer(config, self._keys, self._calls, self._own, self._tiers)

    def publish(self, tier: str, blocks: Sequence[BlockHash]) -> None:
        """See `BlockIndex.publish`."""
        self._own.publish(tier, blocks)
        if tier in self._tiers:
            self._writer.changed(blocks)

    def withdraw(self, tier: str, blocks: Sequence[BlockHash]) -> None:
        """See `BlockIndex.withdraw`."""
        self._own.withdraw(tier, blocks)
        if tier in self._tiers:
            self._writer.changed(blocks)

    def locate(self, blocks: Sequence[BlockHash]) -> list[tuple[Location, ...]]:
        """See `BlockIndex.locate`."""
        elsewhere = self._anywhere(blocks)
        here = self._own.locate(blocks)
        return [own + elsewhere.get(block, ()) for block, own in zip(blocks, here, strict=True)]

    def longest_prefix(self, blocks: Sequence[BlockHash], among: Collection[str]) -> int:
        """See `BlockIndex.longest_prefix`. One round trip at most, and none if all blocks are here."""
        if PEER not in among:
            return self._own.longest_prefix(blocks, among)
        absent = self._own.absent(blocks, among)
        found = self._leading(blocks if len(absent) == len(blocks) else [blocks[position] for position in absent])
        return absent[found] if found < len(absent) else len(blocks)

    def snapshot(self, tier: str) -> frozenset[BlockHash]:
        """See `BlockIndex.snapshot`."""
        return self._own.snapshot(tier)

    def settle(self, timeout_s: float) -> bool:
        """Wait until Redis has all that this node has; False after ``timeout_s``."""
        return self._writer.settle(time.monotonic() + timeout_s)

    @property
    def generation(self) -> int:
        """See `BlockIndex.generation`. It rises when the node had to enter itself anew."""
        return self._writer.generation

    def stats(self) -> IndexStats:
        """See `BlockIndex.stats`."""
        breaker = self._calls.breaker
        return IndexStats(
            calls=dict(self._calls.outcomes),
            near=dict(self._near_counts),
            writer=dict(self._writer.counts),
            queued_changes=self._writer.queued,
            generation=self._writer.generation,
            held=self._writer.held,
            breaker=breaker.state,
            breaker_trips=breaker.trips,
        )

    def close(self) -> None:
        """See `BlockIndex.close`."""
        self._writer.close()
        self._calls.close()
        self._own.close()

    def _leading(self, blocks: Sequence[BlockHash]) -> int:
        """How many leading ``blocks`` are on other nodes."""
        if not blocks:
            return 0
        names = b"".join(blocks)
        question = xxhash.xxh3_128_digest(names)
        known = self._near_prefixes.recall((question,))
        self._tally("hits" if known else "misses", len(blocks))
        if not known:
            answer = self._ask(names, past_gaps=False)
            if answer is None:
                return 0
            if self._writer.number:
                length = sum(answer[0][1::2])
            else:  # entries of this node's former life are among them, until it knows its number
                length = sum(count for _, count in takewhile(itemgetter(0), self._runs(answer)))
            known = {question: length}
            self._near_prefixes.learn(known)
        return known[question]

    def _anywhere(self, blocks: Sequence[BlockHash]) -> dict[BlockHash, _Places]:
        """Places of each of ``blocks`` on other nodes."""
        known = self._near_places.recall(blocks)
        rest = [block for block in blocks if block not in known]
        self._tally("hits", len(blocks) - len(rest))
        self._tally("misses", len(rest))
        for start in range(0, len(rest), MOST_AT_ONCE):
            part = rest[start : start + MOST_AT_ONCE]
            answer = self._ask(b"".join(part), past_gaps=True)
            if answer is not None:
                asked = iter(part)
                fresh = {block: places for places, count in self._runs(answer) for block in islice(asked, count)}
                self._near_places.learn(fresh)
                known |= fresh
        return known

    def _ask(self, names: bytes, *, past_gaps: bool) -> _Answer | None:
        """One round trip: what `LOOK_UP` answers, None without an answer."""
        arguments = [self._writer.number, int(past_gaps), self._start, self._keys.buckets, marks_of(names)]
        answer: _Answer | None = self._calls.script(LOOK_UP, [self._leases], arguments)
        return answer

    def _runs(self, answer: _Answer) -> list[tuple[_Places, int]]:
        """Places on other nodes, each of so many blocks in a row."""
        runs, alive = answer
        nodes = {int(alive[i]): alive[i + 1].decode().split("|") for i in range(0, len(alive), 2)}
        places = {entry: self._places(entry, nodes) for entry in set(runs[::2])}  # few differ: blocks come by the chain
        return [(places[entry], count) for entry, count in zip(runs[::2], runs[1::2], strict=True)]

    def _places(self, entry: bytes, nodes: dict[int, list[str]]) -> _Places:
        places = []
        for number, generation, bits in _PLACE.iter_unpack(entry):
            _, _, _, node, address, tiers, _ = nodes[number]
            if node != self._config.node:
                places += [
                    Location(tier, node, generation, address)
                    for position, tier in enumerate(tiers.split(","))
                    if bits >> position & 1
                ]
        return tuple(places)

    def _tally(self, what: str, count: int) -> None:
        with self._near_lock:
            self._near_counts[what] += count
