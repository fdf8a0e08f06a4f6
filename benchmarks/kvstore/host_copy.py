#!/usr/bin/env python3
"""Blocks into host memory and back, verified, beside a bare copy of the same bytes.

    python benchmarks/kvstore/host_copy.py

A put is a checksum and a copy; a get is a copy and a checksum. The limit is one thread's `numpy.copyto` between as
many equal blocks, both sides touched before, in the same run and in turns.
"""

from __future__ import annotations

import numpy as np
from figures import IDENTITY, SIZES, alternate, names, random_rows, report

from spillway.kvstore import BlockStore, StoreConfig

TOTAL_BYTES = 256 << 20
BATCH = 32
ROUNDS = 7
SEED = 1


def measure(label: str, length: int) -> dict[str, object]:
    """One row: GB/s of put, get and copy for blocks of ``length`` bytes."""
    count = TOTAL_BYTES // length
    source, sink = random_rows(count, length, SEED), random_rows(count, length, SEED + 1)
    copied = np.zeros_like(source)
    hashes = names(count)
    config = StoreConfig(length, IDENTITY, host_bytes=count * (length + 1024) + (1 << 20))
    with BlockStore.open(config) as store:

        def put() -> None:
            for start in range(0, count, BATCH):
                rows = range(start, min(start + BATCH, count))
                assert all(store.put_many([(hashes[row], source[row]) for row in rows]))

        def get() -> None:
            for start in range(0, count, BATCH):
                rows = range(start, min(start + BATCH, count))
                assert all(store.get_many([(hashes[row], sink[row]) for row in rows]))

        def forget() -> None:
            for block in hashes:
                store._held.drop(block)

        def copy() -> None:
            for row in range(count):
                np.copyto(copied[row], source[row])

        def copy_again() -> None:
            for row in range(count):
                np.copyto(sink[row], copied[row])

        put()
        taken = alternate({"forget": forget, "put": put, "copy": copy, "get": get, "copy_again": copy_again}, ROUNDS)
        assert np.array_equal(source, sink)
    speed = {name: TOTAL_BYTES / value / 1e9 for name, value in taken.items()}
    return {
        "block": label,
        "put GB/s": speed["put"],
        "copy GB/s": speed["copy"],
        "share": speed["put"] / speed["copy"],
        "get GB/s": speed["get"],
        "copy back GB/s": speed["copy_again"],
        "share of it": speed["get"] / speed["copy_again"],
        "put us/block": taken["put"] / count * 1e6,
    }


if __name__ == "__main__":
    rows = [measure(label, length) for label, length in SIZES.items()]
    report("host tier against memcpy", rows, {"bytes": TOTAL_BYTES, "batch": BATCH, "rounds": ROUNDS, "seed": SEED})
