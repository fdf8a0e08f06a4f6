#!/usr/bin/env python3
"""The longest prefix of a long chain in a large Redis index, beside a PING that carries as much; and what it weighs.

    python benchmarks/kvstore/lookup.py

Four nodes enter a million blocks through `RedisIndex`, in a Redis as it comes; a fifth looks up chains of 1,000 of
them. ``by chains``: a node enters a chain as a store does that computed it, in puts of 32 blocks, one after another,
the last block of each first. ``by blocks``: no two neighbours are on one node, the worst case. A PING echoes its
payload: ``PING names`` is as long as the names asked for, ``PING request`` as the whole request on the wire. Both go
through the same client library and take turns with the look-ups. ``again``: the same question within a second,
answered from what is remembered. ``places``: where each block of a chain is, which a load asks. Memory is Redis's
`used_memory` with the entries, segments and reverse sets included, less without.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from figures import IDENTITY, report
from redis import Redis
from servers import redis_server

from spillway.kvstore import BlockHash
from spillway.kvstore.index.base import PEER
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig

ENTRIES = 1_000_000
NODES = 4
CHAIN = 1000
PUT = 32
LOOKUPS = 1000
PATIENCE_S = 600.0
SEED = 1
Parts = Iterator[tuple[int, list[BlockHash]]]
Rows = tuple[list[dict[str, object]], dict[str, object]]


def node(socket: str, name: str, near_s: float = 0) -> RedisIndex:
    """A node of the index. Leases outlast the filling."""
    config = RedisConfig(
        f"unix://{socket}", name, f"{name}:7000", lease_s=60, timeout_s=5, near_s=near_s, most_changes=2 * ENTRIES
    )
    return RedisIndex(config, IDENTITY.digest())


def quantile(taken: list[float], share: float) -> float:
    """Milliseconds."""
    return sorted(taken)[min(len(taken) - 1, int(share * len(taken)))] * 1e3


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Seconds."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def by_chains(blocks: Sequence[BlockHash]) -> Parts:
    """Which node enters which blocks."""
    for number, start in enumerate(range(0, len(blocks), CHAIN)):
        chain = blocks[start : start + CHAIN]
        for put in range(0, len(chain), PUT):
            yield number % NODES, list(reversed(chain[put : put + PUT]))


def by_blocks(blocks: Sequence[BlockHash]) -> Parts:
    """The same, each block on another node than its neighbours."""
    for number in range(NODES):
        yield number, list(blocks[number::NODES])


def enter(writers: Sequence[RedisIndex], parts: Parts) -> None:
    """Have each node enter its parts, one after another, all nodes at once."""
    mine: list[list[list[BlockHash]]] = [[] for _ in writers]
    for number, part in parts:
        mine[number].append(part)

    def work(number: int) -> None:
        for part in mine[number]:
            writers[number].publish("host", part)
            assert writers[number].settle(PATIENCE_S)

    with ThreadPoolExecutor(len(writers)) as pool:
        list(pool.map(work, range(len(writers))))


def measure(placement: str, parts: Parts, chains: Sequence[Sequence[BlockHash]]) -> Rows:
    """Rows of one placement, and what else is to be told of it."""
    with redis_server() as socket, Redis(unix_socket_path=socket) as client:
        writers = [node(socket, f"writer-{number}") for number in range(NODES)]
        assert all(writer.settle(PATIENCE_S) for writer in writers)
        before = client.info("memory")["used_memory"]
        start = time.perf_counter()
        enter(writers, parts)
        filled_s = time.perf_counter() - start
        bytes_per_entry = (client.info("memory")["used_memory"] - before) / ENTRIES
        reader, remembers = node(socket, "reader"), node(socket, "remembers", near_s=1.0)
        assert reader.settle(PATIENCE_S)
        assert remembers.settle(PATIENCE_S)
        assert reader.longest_prefix(chains[0], (PEER,)) == CHAIN
        asked = [asked_with(reader, client, chain) for chain in chains[1:9]]
        round_trips, request_bytes = (min(each) for each in zip(*asked, strict=True))
        client.config_resetstat()
        assert all(reader.longest_prefix(chain, (PEER,)) == CHAIN for chain in chains[:100])
        script_us = client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]
        taken = rounds(client, reader, remembers, chains, request_bytes)
        for index in (*writers, reader, remembers):
            index.close()
    look_up = taken["look-up"]
    rows: list[dict[str, object]] = [
        {
            "entered": placement,
            "what": what,
            "p50 ms": quantile(times, 0.5),
            "p99 ms": quantile(times, 0.99),
            "look-up p50 over it": quantile(look_up, 0.5) / quantile(times, 0.5),
            "look-up p99 over it": quantile(look_up, 0.99) / quantile(times, 0.99),
        }
        for what, times in taken.items()
    ]
    return rows, {
        f"round trips {placement}": round_trips, f"request bytes {placement}": request_bytes,
        f"bytes per entry {placement}": round(bytes_per_entry, 1), f"script ms {placement}": round(script_us / 1e3, 3),
        f"filled in s {placement}": round(filled_s, 1),
    }  # fmt: skip


def asked_with(reader: RedisIndex, client: Redis, chain: Sequence[BlockHash]) -> tuple[int, int]:
    """Round trips and bytes of one look-up; more, if the node renewed its lease meanwhile."""
    calls, sent = reader.stats().calls["answered"], client.info("stats")["total_net_input_bytes"]
    reader.longest_prefix(chain, (PEER,))
    calls = reader.stats().calls["answered"] - calls
    return calls, client.info("stats")["total_net_input_bytes"] - sent


def rounds(
    client: Redis,
    reader: RedisIndex,
    remembers: RedisIndex,
    chains: Sequence[Sequence[BlockHash]],
    request_bytes: int,
) -> dict[str, list[float]]:
    """Seconds of each, in turns."""
    taken: dict[str, list[float]] = {
        what: [] for what in ("look-up", "PING names", "PING request", "again", "places", "places again")
    }
    for chain in chains:
        taken["look-up"].append(timed(reader.longest_prefix, chain, (PEER,)))
        taken["PING names"].append(timed(client.execute_command, "PING", bytes(CHAIN * 32)))
        taken["PING request"].append(timed(client.execute_command, "PING", bytes(request_bytes)))
    for chain in chains:
        remembers.longest_prefix(chain, (PEER,))
        taken["again"].append(timed(remembers.longest_prefix, chain, (PEER,)))
        taken["places"].append(timed(remembers.locate, chain))
        taken["places again"].append(timed(remembers.locate, chain))
    return taken


def main() -> None:
    rng = random.Random(SEED)
    blocks = [BlockHash(rng.randbytes(32)) for _ in range(ENTRIES)]
    chains = [blocks[start : start + CHAIN] for start in (rng.randrange(ENTRIES - CHAIN) for _ in range(LOOKUPS))]
    settings: dict[str, object] = {
        "entries": ENTRIES, "nodes": NODES, "chain": CHAIN, "look-ups": LOOKUPS, "seed": SEED,
    }  # fmt: skip
    rows = []
    for placement, parts in (("by chains", by_chains(blocks)), ("by blocks", by_blocks(blocks))):
        more, told = measure(placement, parts, chains)
        rows += more
        settings |= told
    report("longest prefix in a shared index", rows, settings)


if __name__ == "__main__":
    main()
