"""The index in Redis as people see it: all namespaces and nodes, living and dead. Reads only."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from redis.exceptions import RedisClusterException, RedisError

from ..errors import ConfigError, IndexUnavailableError
from ..identity import HASH_BYTES, BlockHash
from ..index.about import About
from ..index.redis_client import connect
from ..index.redis_scripts import MARK_BYTES, Keys, unpack_entry

_Item = TypeVar("_Item")
PREFIX = "spillway"
BUCKETS_AT_ONCE = 64
"""So many buckets of a million entries are some 4,000 entries: a call of a few milliseconds, between look-ups."""
_HELD = struct.Struct(">III")
"""A place without its segment."""
_COUNT = """
local counts, blocks = {}, 0
for i = 1, #KEYS do
  for _, places in ipairs(redis.call('HVALS', KEYS[i])) do
    blocks = blocks + 1
    for p = 25, #places, 16 do
      local place = string.sub(places, p, p + 11)
      counts[place] = (counts[place] or 0) + 1
    end
  end
end
local out = {blocks}
for place, count in pairs(counts) do out[#out + 1] = place; out[#out + 1] = count end
return out
"""
"""KEYS buckets. How many blocks are in them, then each different place with its count."""


@dataclass(frozen=True, slots=True)
class Node:
    """Of a namespace. ``lease_s``: seconds until its lease ends, negative since it ended; ``length_s``: its length."""

    keys: Keys
    number: int
    name: str
    generation: int
    lease_s: float
    length_s: float
    address: str
    tiers: tuple[str, ...]
    about: About

    @property
    def live(self) -> bool:
        """Whether its lease holds, so that look-ups see its blocks."""
        return 0 < self.lease_s <= 2 * self.length_s


@dataclass(frozen=True, slots=True)
class Place:
    """An entry of a block. ``stale``: of an older generation or a dead node, invisible to look-ups."""

    node: Node | None
    tiers: tuple[str, ...]
    stale: bool


@dataclass(frozen=True, slots=True)
class Census:
    """``blocks``: different ones. ``held``: blocks per node number and tier. ``stale``: entries per node number."""

    blocks: int
    held: dict[int, dict[str, int]]
    stale: dict[int, int]


class SharedIndex:
    """A connection for people. Every method raises `IndexUnavailableError` if Redis does not answer or refuses."""

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        """Raises `ConfigError` for a URL that is none, `IndexUnavailableError`."""
        try:
            parts = urlsplit(url)
            self.where = f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
            with self.answering():
                self.client = connect(url, timeout_s)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the URL of the Redis index cannot be used: {error}") from None
        with self.answering():
            self.client.ping()

    def namespaces(self) -> list[Keys]:
        """One per identity of blocks. Scans the names of keys: some ten thousand for a million entries."""
        found = []
        with self.answering():
            for key in self.client.scan_iter(match=f"{{{PREFIX}:v2:*}}:leases", count=1000):
                _, _, buckets, namespace = key.decode().partition("}")[0].split(":")
                found.append(Keys(PREFIX, namespace, int(buckets)))
        return sorted(found, key=lambda keys: keys.namespace)

    def nodes(self, keys: Keys) -> list[Node]:
        """All that are not forgotten yet, by name."""
        with self.answering():
            leases = self.client.hgetall(keys.of("leases"))
            abouts = self.client.hgetall(keys.of("about"))
            seconds, microseconds = self.client.eval("return redis.call('TIME')", 1, keys.of("leases"))
        now_s = int(seconds) + int(microseconds) * 1e-6
        nodes = []
        for number, lease in leases.items():
            generation, ends_ms, _, name, address, tiers, length_ms = lease.decode().split("|")
            about = About.unpack(abouts.get(number, b""))
            lease_s = int(ends_ms) / 1000 - now_s
            length_s = int(length_ms) / 1000
            served = tuple(tiers.split(","))
            nodes.append(Node(keys, int(number), name, int(generation), lease_s, length_s, address, served, about))
        return sorted(nodes, key=lambda node: (node.name, node.number))

    def census(self, keys: Keys, nodes: Sequence[Node]) -> Census:
        """Count all entries, in short calls."""
        known = {node.number: node for node in nodes}
        blocks, held, stale = 0, {node.number: dict.fromkeys(node.tiers, 0) for node in nodes}, dict[int, int]()
        for buckets in _portions(self._buckets(nodes)):
            with self.answering():
                names = [keys.of("b", bucket) for bucket in buckets]
                answer = self.client.eval(_COUNT, len(names), *names)
            blocks += int(answer[0])
            for entry, count in zip(answer[1::2], answer[2::2], strict=True):
                number, place = self._place(_HELD.unpack(entry), known)
                if place.stale:
                    stale[number] = stale.get(number, 0) + int(count)
                    continue
                for tier in place.tiers:
                    held[number][tier] += int(count)
        return Census(blocks, held, stale)

    def find(self, keys: Keys, nodes: Sequence[Node], starts: Sequence[bytes]) -> dict[BlockHash, list[Place]]:
        """Blocks whose hash is, or begins with, one of ``starts`` (four bytes or more), and where they are."""
        known = {node.number: node for node in nodes}
        found: dict[BlockHash, list[Place]] = {}
        for portion in _portions(starts):
            with self.answering(), self.client.pipeline(transaction=False) as pipeline:
                for start in portion:
                    bucket = keys.of("b", keys.bucket(start))
                    if len(start) == HASH_BYTES:
                        pipeline.hget(bucket, start[:MARK_BYTES])
                    else:
                        pipeline.hgetall(bucket)
                answers = pipeline.execute()
            for start, answer in zip(portion, answers, strict=True):
                entries = answer if isinstance(answer, dict) else {start[:MARK_BYTES]: answer} if answer else {}
                for block, places in (unpack_entry(*item) for item in entries.items()):
                    if block.startswith(start):
                        found[block] = [self._place(place[:3], known)[1] for place in places]
        return found

    def blocks_of(self, node: Node) -> Iterator[list[BlockHash]]:
        """What a living node has entered, portion by portion."""
        for portion in _portions(self._buckets([node])):
            with self.answering(), self.client.pipeline(transaction=False) as pipeline:
                for bucket in portion:
                    pipeline.hgetall(node.keys.of("b", bucket))
                answers = pipeline.execute()
            wanted = (node.number, node.generation)
            yield [
                block
                for entries in answers
                for block, places in (unpack_entry(*item) for item in entries.items())
                if any(place[:2] == wanted for place in places)
            ]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turns what the client raises into `IndexUnavailableError`."""
        try:
            yield
        except (RedisError, RedisClusterException, OSError) as error:
            raise IndexUnavailableError(f"the Redis index at {self.where} does not serve us: {error}") from error

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def _buckets(self, nodes: Sequence[Node]) -> list[int]:
        """All that ``nodes`` have entries in, by their reverse sets."""
        with self.answering():
            members = [self.client.smembers(node.keys.of("r", node.number)) for node in nodes]
        return sorted({int(bucket) for found in members for bucket in found})

    def _place(self, held: tuple[int, int, int], known: dict[int, Node]) -> tuple[int, Place]:
        number, generation, bits = held
        node = known.get(number)
        if node is None:
            return number, Place(None, (), stale=True)
        tiers = tuple(tier for position, tier in enumerate(node.tiers) if bits >> position & 1)
        return number, Place(node, tiers, stale=not node.live or generation != node.generation)


def _portions(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    return (items[start : start + BUCKETS_AT_ONCE] for start in range(0, len(items), BUCKETS_AT_ONCE))
