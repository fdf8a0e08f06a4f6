"""Peers that are processes of their own: killed within a transfer, frozen, started again as another generation."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from kv_factories import blank, content, header_of, name, store_config
from peer_factories import PATIENT_S, KnownPeers, Served, peers

from spillway.kvstore import BlockHash, BlockStore
from spillway.kvstore.header import BlockHeader
from spillway.kvstore.outcomes import MissReason

BLOCKS = 200
HALF = 100


@contextlib.contextmanager
def serving(listen: str = "127.0.0.1:0", generation: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves blocks 0 … 199, and its address."""
    command = [sys.executable, __file__, listen, str(generation)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def get(store: BlockStore, *numbers: int) -> list[bool]:
    outs = [blank() for _ in numbers]
    found = store.get_many([(name(number), out) for number, out in zip(numbers, outs, strict=True)])
    for number, out, hit in zip(numbers, outs, found, strict=True):
        assert not hit or np.array_equal(out, content(number)), f"wrong bytes for block {number}"
    return found


def store_of(tmp_path: Path, index: KnownPeers, stall_s: float) -> BlockStore:
    return BlockStore.open(store_config(tmp_path, host=8, read_threads=1, peers=peers("", stall_s=stall_s)), index)


def test_killed_within_a_transfer(tmp_path: Path) -> None:
    index = KnownPeers()
    chain = [name(number) for number in range(BLOCKS)]
    with serving() as (process, address), store_of(tmp_path, index, PATIENT_S) as store:
        index.say(chain, address)
        tier = store._parts.readers[0].lane.tier
        answers: list[BlockHeader | MissReason] = []
        out = blank()

        def arrived(position: int, answer: BlockHeader | MissReason) -> bool:
            if position == HALF:
                process.kill()
                process.wait()
            answers.append(answer)
            assert not isinstance(answer, BlockHeader) or np.array_equal(out, content(position))
            return True

        tier.load_each(chain, out, time.monotonic() + PATIENT_S, arrived)
        assert len(answers) == BLOCKS, "every block is answered for"
        assert all(isinstance(answer, BlockHeader) for answer in answers[:HALF])
        assert all(isinstance(answer, BlockHeader | MissReason) for answer in answers[HALF:])
        assert get(store, 0) == [False]
        assert tier.connections() == (0, 0)


def test_frozen_is_a_miss_and_thawed_it_serves_again(tmp_path: Path) -> None:
    index = KnownPeers()
    with serving() as (process, address), store_of(tmp_path, index, 0.2) as store:
        index.say([name(number) for number in range(BLOCKS)], address)
        until = time.monotonic() + PATIENT_S
        while not get(store, 1)[0] and time.monotonic() < until:
            pass
        process.send_signal(signal.SIGSTOP)
        try:
            assert get(store, 20, 21, 22) == [False] * 3
            figures = store.stats().tiers["peer"]
            assert set(figures.misses) <= {"unreachable", "breaker", "absent"}
            assert figures.breaker == "closed", "the others are still asked"
        finally:
            process.send_signal(signal.SIGCONT)
        until = time.monotonic() + PATIENT_S
        while not get(store, 30)[0] and time.monotonic() < until:
            time.sleep(0.05)
        assert get(store, 40) == [True]


def test_a_restarted_peer_is_another_generation(tmp_path: Path) -> None:
    index = KnownPeers()
    blocks: list[BlockHash] = [name(number) for number in range(BLOCKS)]
    with store_of(tmp_path, index, PATIENT_S) as store:
        with serving(generation=1) as (_, address):
            index.say(blocks, address, generation=1)
            assert get(store, 1) == [True]
        with serving(address, generation=2):
            assert get(store, 20) == [False], "entries of the old generation are not served"
            assert store.stats().tiers["peer"].misses["refused"] == 1
            index.say(blocks, address, generation=2)
            assert get(store, 20) == [True]


def _serve(listen: str, generation: int) -> None:
    served = Served(BLOCKS, peers(listen), generation)
    for number in range(BLOCKS):
        served.held.store(header_of(number, content(number)), content(number))
    sys.stdout.write(served.server.address + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
