#!/usr/bin/env python3
"""The longest prefix of a long chain in a large Redis index, beside a PING that carries as much; and what it weighs.

    python benchmarks/kvstore/lookup.py

Four nodes enter a million blocks through `RedisIndex`, in a Redis as it comes; a fifth looks up chains of 1,000 of
them, nothing remembered between. A PING echoes its payload: ``hashes`` is as long as the hashes asked for, ``request``
as the whole request on the wire. Both go through the same client library and take turns with the look-ups. ``script``:
how long Redis itself says that a look-up takes. Memory is its `used_memory` with the entries, reverse sets included,
less without.
"""

from __future__ import annotations

import random
import time

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
LOOKUPS = 1000
PATIENCE_S = 600.0
SEED = 1


def node(socket: str, name: str) -> RedisIndex:
    """A node of the index. Leases outlast the filling; nothing is remembered."""
    config = RedisConfig(
        f"unix://{socket}", name, f"{name}:7000", lease_s=60, timeout_s=5, near_s=0, most_changes=2 * ENTRIES
    )
    return RedisIndex(config, IDENTITY.digest())


def quantile(taken: list[float], share: float) -> float:
    """Milliseconds."""
    return sorted(taken)[min(len(taken) - 1, int(share * len(taken)))] * 1e3


def timed(work: object, *arguments: object) -> float:
    """Seconds."""
    start = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    rng = random.Random(SEED)
    blocks = [BlockHash(rng.randbytes(32)) for _ in range(ENTRIES)]
    chains = [blocks[start : start + CHAIN] for start in (rng.randrange(ENTRIES - CHAIN) for _ in range(LOOKUPS))]
    with redis_server() as socket, Redis(unix_socket_path=socket) as client:
        writers = [node(socket, f"writer-{number}") for number in range(NODES)]
        assert all(writer.settle(PATIENCE_S) for writer in writers)
        before = client.info("memory")["used_memory"]
        start = time.perf_counter()
        for number, writer in enumerate(writers):
            writer.publish("host", blocks[number::NODES])
        assert all(writer.settle(PATIENCE_S) for writer in writers)
        filled_s = time.perf_counter() - start
        bytes_per_entry = (client.info("memory")["used_memory"] - before) / ENTRIES
        reader = node(socket, "reader")
        assert reader.settle(PATIENCE_S)
        assert reader.longest_prefix(chains[0], (PEER,)) == CHAIN
        calls, sent = reader.stats().calls["answered"], client.info("stats")["total_net_input_bytes"]
        assert reader.longest_prefix(chains[1], (PEER,)) == CHAIN
        round_trips = reader.stats().calls["answered"] - calls
        request_bytes = client.info("stats")["total_net_input_bytes"] - sent
        client.config_resetstat()
        taken: dict[str, list[float]] = {"look-up": [], "hashes": [], "request": []}
        for chain in chains:
            taken["look-up"].append(timed(reader.longest_prefix, chain, (PEER,)))
            taken["hashes"].append(timed(client.execute_command, "PING", bytes(CHAIN * 32)))
            taken["request"].append(timed(client.execute_command, "PING", bytes(request_bytes)))
        script_us = client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]
        for index in (*writers, reader):
            index.close()
    rows = [
        {
            "what": what,
            "p50 ms": quantile(times, 0.5),
            "p99 ms": quantile(times, 0.99),
            "look-up p50 over it": quantile(taken["look-up"], 0.5) / quantile(times, 0.5),
            "look-up p99 over it": quantile(taken["look-up"], 0.99) / quantile(times, 0.99),
        }
        for what, times in taken.items()
    ]
    settings = {
        "entries": ENTRIES, "nodes": NODES, "chain": CHAIN, "look-ups": LOOKUPS, "seed": SEED,
        "round trips": round_trips, "request bytes": request_bytes, "bytes per entry": round(bytes_per_entry, 1),
        "script ms": round(script_us / 1e3, 3), "filled in s": round(filled_s, 1),
    }  # fmt: skip
    report("longest prefix in a shared index", rows, settings)


if __name__ == "__main__":
    main()
