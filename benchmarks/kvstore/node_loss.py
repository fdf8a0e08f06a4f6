#!/usr/bin/env python3
"""A node with 100,000 blocks dies: how long its entries take to go, and what look-ups feel of it meanwhile.

    python benchmarks/kvstore/node_loss.py

The node is a process that enters its blocks and is killed by SIGKILL. Two more nodes live, with as many blocks each;
each of them finds the lease over and deletes. One of them, this process, looks up chains of 200 blocks of the other all
the time: before the loss, while entries go, and after.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time

from figures import IDENTITY, report
from lookup import quantile, timed
from redis import Redis
from servers import redis_server

from spillway.kvstore import BlockHash
from spillway.kvstore.index.base import PEER
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig

BLOCKS = 100_000
CHAIN = 200
LEASE_S = 3.0
QUIET_S = 5.0
PAUSE_S = 0.002
PATIENCE_S = 300.0


def blocks_of(name: str) -> list[BlockHash]:
    """What a node holds."""
    rng = random.Random(name)
    return [BlockHash(rng.randbytes(32)) for _ in range(BLOCKS)]


def node(socket: str, name: str) -> RedisIndex:
    """A node of the index, with all its blocks entered."""
    config = RedisConfig(f"unix://{socket}", name, f"{name}:7000", lease_s=LEASE_S, timeout_s=0.9, near_s=0)
    index = RedisIndex(config, IDENTITY.digest())
    index.publish("host", blocks_of(name))
    assert index.settle(PATIENCE_S)
    return index


def start(socket: str, name: str) -> subprocess.Popen[bytes]:
    """A node as a process, ready."""
    process = subprocess.Popen([sys.executable, __file__, socket, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def entries(client: Redis) -> int:
    """Blocks in the index."""
    return sum(client.hlen(key) for key in client.scan_iter("*:b:*", count=2000))


def main() -> None:
    with redis_server() as socket, Redis(unix_socket_path=socket) as client:
        other = start(socket, "other")
        lost = start(socket, "lost")
        own = node(socket, "own")
        chain = blocks_of("other")
        taken: dict[str, list[float]] = {"before": [], "while": [], "after": []}

        def look(phase: str) -> None:
            begin = random.randrange(BLOCKS - CHAIN)
            taken[phase].append(timed(own.longest_prefix, chain[begin : begin + CHAIN], (PEER,)))
            time.sleep(PAUSE_S)

        def look_for(phase: str, seconds: float) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                look(phase)

        look_for("before", QUIET_S)
        lost.kill()
        lost.wait()
        killed = time.monotonic()
        reverse = next(key for key in client.scan_iter("*:leases")).decode().removesuffix("leases")
        number = client.hget(f"{reverse}numbers", "lost").decode()
        buckets = client.scard(f"{reverse}r:{number}")
        while client.scard(f"{reverse}r:{number}") == buckets:
            time.sleep(0.001)
        begun = time.monotonic()
        while client.exists(f"{reverse}r:{number}"):
            for _ in range(10):
                look("while")
        gone = time.monotonic()
        look_for("after", QUIET_S)
        left = entries(client)
        other.kill()
        other.wait()
        own.close()
    rows = [
        {
            "look-ups": phase,
            "count": len(times),
            "p50 ms": quantile(times, 0.5),
            "p99 ms": quantile(times, 0.99),
            "p50 over before": quantile(times, 0.5) / quantile(taken["before"], 0.5),
            "p99 over before": quantile(times, 0.99) / quantile(taken["before"], 0.99),
        }
        for phase, times in taken.items()
    ]
    settings = {
        "blocks": BLOCKS, "chain": CHAIN, "lease s": LEASE_S, "begun after s": round(begun - killed, 2),
        "cleaned in s": round(gone - begun, 2), "entries left": left, "of": 2 * BLOCKS,
    }  # fmt: skip
    report("a node lost", rows, settings)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        index = node(*sys.argv[1:])
        print("ready", flush=True)
        sys.stdin.read()
    else:
        main()
