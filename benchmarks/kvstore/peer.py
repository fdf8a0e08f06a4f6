#!/usr/bin/env python3
"""Blocks from a peer's host memory, verified, beside what iperf3 gets over the same veth pair.

    python benchmarks/kvstore/peer.py        # root, or user namespaces; redis-py; iperf3, else a loop on plain sockets

Both ends are processes in network namespaces of their own. ``store``: `get_many` in batches, from the request to bytes
in the caller's buffers, checksums and copies included, with as many callers as iperf3 has streams. ``link``: the
protocol alone, into one preallocated buffer. All three take turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from figures import IDENTITY, SIZES, names, random_rows, report, seconds
from servers import FAR, inside_namespaces, second_host

from spillway.kvstore import BlockHash, BlockStore, Deadlines, PeersConfig, StoreConfig
from spillway.kvstore.buffers import aligned
from spillway.kvstore.index.base import PEER, Location
from spillway.kvstore.index.memory import MemoryIndex
from spillway.kvstore.peer.links import Link, Peer

TOTAL_BYTES = 256 << 20
BATCH = 32
ROUNDS = 5
LIMIT_S = 2
STREAMS = (1, 2)
SEED = 1
PORT = 7400
LIMIT_PORT = 5201
TOKEN = b"a token of benchmarks"
PEER_NODE = Peer("far", 0, f"{FAR}:{PORT}")


class AllAtThePeer(MemoryIndex):
    """An index that knows of one other node, which has everything."""

    def locate(self, blocks: Sequence[BlockHash]) -> list[tuple[Location, ...]]:
        place = Location("host", PEER_NODE.node, PEER_NODE.generation, PEER_NODE.address)
        return [(place,) for _ in blocks]

    def longest_prefix(self, blocks: Sequence[BlockHash], among: Collection[str]) -> int:
        return len(blocks) if PEER in among else 0


def serve(length: int) -> None:
    """The other end: a store full of blocks, until standard input ends."""
    count = TOTAL_BYTES // length
    rows = random_rows(min(count, 64), length, SEED)
    peers = PeersConfig(TOKEN, listen=f"{FAR}:{PORT}")
    config = StoreConfig(length, IDENTITY, host_bytes=count * (length + 1024) + (1 << 20), peers=peers)
    with BlockStore.open(config) as store:
        hashes = names(count)
        for start in range(0, count, BATCH):
            chosen = range(start, min(start + BATCH, count))
            assert all(store.put_many([(hashes[number], rows[number % len(rows)]) for number in chosen]))
        print("ready", flush=True)
        sys.stdin.read()


def iperf3(there: Sequence[str], streams: int) -> float:
    """Bytes per second, as the receiver counts them; the other host sends."""
    server = subprocess.Popen([*there, "iperf3", "-s", "-1", "-B", FAR], stdout=subprocess.DEVNULL)
    command = ["iperf3", "-c", FAR, "-R", "-J", "-t", str(LIMIT_S), "-P", str(streams)]
    try:
        for _ in range(100):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            answer = json.loads(done.stdout)
            if "error" not in answer:
                return float(answer["end"]["sum_received"]["bits_per_second"]) / 8
            time.sleep(0.05)  # it does not listen yet
        raise SystemExit(f"iperf3: {answer['error']}")
    finally:
        server.kill()
        server.wait()


def send_for_ever() -> None:
    """The limit without iperf3: whoever connects is sent bytes until it leaves."""
    data = bytes(128 << 10)

    def pour(connection: socket.socket) -> None:
        try:
            while True:
                connection.sendall(data)
        except OSError:
            connection.close()

    with socket.create_server((FAR, LIMIT_PORT)) as listener:
        print("ready", flush=True)
        while True:
            threading.Thread(target=pour, args=(listener.accept()[0],), daemon=True).start()


def plain_sockets(there: Sequence[str], streams: int) -> float:
    """Bytes per second of `recv_into` loops."""
    server = subprocess.Popen([*there, sys.executable, __file__, "--pour"], stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()

    def drain(_: int) -> int:
        got, buffer, until = 0, bytearray(1 << 20), time.monotonic() + LIMIT_S
        with socket.create_connection((FAR, LIMIT_PORT)) as connection:
            while time.monotonic() < until:
                got += connection.recv_into(buffer)
        return got

    try:
        with ThreadPoolExecutor(streams) as pool:
            return sum(pool.map(drain, range(streams))) / LIMIT_S
    finally:
        server.kill()
        server.wait()


def over_links(hashes: Sequence[BlockHash], length: int, links: Sequence[Link]) -> None:
    """All blocks through the protocol alone, shared out over ``links``."""

    def drain(at: int) -> None:
        buffer, mine = aligned(length), hashes[at :: len(links)]
        for start in range(0, len(mine), BATCH):
            links[at].get(mine[start : start + BATCH], buffer, time.monotonic() + 60, lambda *_: True)

    with ThreadPoolExecutor(len(links)) as pool:
        list(pool.map(drain, range(len(links))))


def through_stores(hashes: Sequence[BlockHash], store: BlockStore, outs: Sequence[Sequence[object]]) -> None:
    """All blocks by `get_many`, with as many callers as ``outs`` has sets of buffers."""

    def drain(at: int) -> None:
        mine = hashes[at :: len(outs)]
        for start in range(0, len(mine), BATCH):
            assert all(store.get_many(list(zip(mine[start : start + BATCH], outs[at], strict=False))))

    with ThreadPoolExecutor(len(outs)) as pool:
        list(pool.map(drain, range(len(outs))))


def measure(label: str, length: int, streams: int, there: Sequence[str]) -> dict[str, object]:
    """One row."""
    hashes = names(TOTAL_BYTES // length)
    command = [*there, sys.executable, __file__, "--serve", str(length)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    speeds: dict[str, list[float]] = {"limit": [], "link": [], "store": []}
    peers = PeersConfig(TOKEN, stall_s=30)
    limit = iperf3 if shutil.which("iperf3") else plain_sockets
    with tempfile.TemporaryDirectory() as directory:
        config = StoreConfig(
            length, IDENTITY, disk_bytes=(16 << 20) + 4 * length, disk_dir=Path(directory), disk_free_floor_bytes=0,
            peers=peers, read_threads=streams, deadlines=Deadlines(load_s=60),
        )  # fmt: skip
        outs = [[aligned(length) for _ in range(BATCH)] for _ in range(streams)]
        deadline = time.monotonic() + 60
        links = [Link(PEER_NODE, peers, IDENTITY.digest(), deadline) for _ in range(streams)]
        with BlockStore.open(config, AllAtThePeer()) as store:
            through_stores(hashes, store, outs)
            for _ in range(ROUNDS):
                speeds["limit"].append(limit(there, streams))
                speeds["link"].append(TOTAL_BYTES / seconds(lambda: over_links(hashes, length, links)))
                speeds["store"].append(TOTAL_BYTES / seconds(lambda: through_stores(hashes, store, outs)))
        for link in links:
            link.close()
    server.kill()
    server.wait()
    best = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "block": label,
        "streams": streams,
        "limit GB/s": best["limit"] / 1e9,
        "link GB/s": best["link"] / 1e9,
        "link share": best["link"] / best["limit"],
        "store GB/s": best["store"] / 1e9,
        "store share": best["store"] / best["limit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=int, metavar="BYTES", help=argparse.SUPPRESS)
    parser.add_argument("--pour", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    elif options.pour:
        send_for_ever()
    else:
        inside_namespaces()
        there = second_host()
        rows = [measure(label, length, streams, there) for label, length in SIZES.items() for streams in STREAMS]
        used = "iperf3" if shutil.which("iperf3") else "plain sockets"
        settings = {"bytes": TOTAL_BYTES, "batch": BATCH, "rounds": ROUNDS, "limit by": used, "seed": SEED}
        report("peer tier against the wire", rows, settings)


if __name__ == "__main__":
    main()
