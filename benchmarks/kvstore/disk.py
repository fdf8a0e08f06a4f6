#!/usr/bin/env python3
"""Blocks to disk and back, verified, beside what fio gets from the same disk with the same pattern.

    python benchmarks/kvstore/disk.py [--directory DIR]

Written: a store without a host tier takes blocks and writes them behind; the time ends when all are on disk.
Overwritten: the same again in a full store, so that every block evicts another. Read: batches in random order. fio
runs in turns with the store: direct I/O, as many threads as the store has, the same size of access (block and
header). It writes first to a file that is only preallocated, as the store does, where a file system takes longer
(ext4 notes what has been written), then over the same again. Both read once before they are measured. A share is the
median of its rounds: disks of virtual machines change by the minute. Without fio its place is taken by a loop of
`os.pwritev` and `os.preadv` on as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from figures import IDENTITY, SIZES, names, random_rows, report, seconds

from spillway.kvstore import BlockHash, BlockStore, Deadlines, StoreConfig
from spillway.kvstore.buffers import aligned
from spillway.kvstore.tiers.disk.files import open_file, read_all, supports_direct_io, write_all

TOTAL_BYTES = 1 << 30
BATCH = 32
ROUNDS = 3
SEED = 1
HEADER_BYTES = 4096


class Limit:
    """What the disk gives to plain accesses of ``length`` bytes: by fio, or by a loop of our own."""

    def __init__(self, directory: Path, length: int, config: StoreConfig) -> None:
        self.path = directory / "limit"
        self.length = length
        self.count = TOTAL_BYTES // length
        self.config = config

    def allocate(self) -> None:
        """Begin with a file of blocks that were never written."""
        self.path.unlink(missing_ok=True)
        descriptor = open_file(self.path, direct=False, create=True)
        os.posix_fallocate(descriptor, 0, self.count * self.length)
        os.fsync(descriptor)
        os.close(descriptor)

    def bytes_per_s(self, pattern: str) -> float:
        """``write`` in order or ``randread``."""
        threads = self.config.write_threads if pattern == "write" else self.config.read_threads
        return self._fio(pattern, threads) if shutil.which("fio") else self._loop(pattern, threads)

    def _fio(self, pattern: str, threads: int) -> float:
        share = self.count // threads * self.length
        options = {
            "name": "limit", "filename": self.path, "rw": pattern, "bs": self.length, "size": share, "numjobs": threads,
            "ioengine": "psync", "direct": 1, "group_reporting": 1, "output-format": "json", "thread": 1,
            "offset_increment": share, "randseed": SEED, "fallocate": "none",
        }  # fmt: skip
        command = ["fio", *(f"--{key}={value}" for key, value in options.items())]
        output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        (job,) = json.loads(output)["jobs"]
        return float(job["write" if pattern == "write" else "read"]["bw_bytes"])

    def _loop(self, pattern: str, threads: int) -> float:
        descriptor = open_file(self.path, direct=supports_direct_io(self.path.parent))
        order = list(range(self.count))
        if pattern != "write":
            random.Random(SEED).shuffle(order)

        def work(mine: list[int]) -> None:
            buffer = aligned(self.length)
            for position in mine:
                (write_all if pattern == "write" else read_all)(descriptor, [buffer], position * self.length)

        with ThreadPoolExecutor(threads) as pool:
            taken = seconds(lambda: list(pool.map(work, [order[at::threads] for at in range(threads)])))
        os.close(descriptor)
        return self.count * self.length / taken


def measure(label: str, length: int, directory: Path) -> dict[str, object]:
    """One row."""
    count = TOTAL_BYTES // (length + HEADER_BYTES)
    rows = random_rows(min(count, (64 << 20) // length), length, SEED)
    config = StoreConfig(
        length,
        IDENTITY,
        disk_bytes=TOTAL_BYTES + (64 << 20),
        disk_dir=directory / "store",
        disk_free_floor_bytes=0,
        deadlines=Deadlines(put_s=60, load_s=60),
    )
    limit = Limit(directory, length + HEADER_BYTES, config)
    hashes = names(2 * count)
    order = list(range(count))
    random.Random(SEED).shuffle(order)
    outs = [aligned(length) for _ in range(BATCH)]
    speeds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        speeds.setdefault(name, []).append(value)

    for _ in range(ROUNDS):
        shutil.rmtree(directory / "store", ignore_errors=True)
        with BlockStore.open(config) as store:
            note("write", count * length / seconds(lambda: fill(store, hashes[:count], rows)))
            limit.allocate()
            note("write limit", limit.bytes_per_s("write"))
            there = [number for number in order if store.contains(hashes[number])]
            for number in range(3):
                read = len(there) * length / seconds(partial(load, store, there, hashes, outs))
                plain = limit.bytes_per_s("randread")
                if number:  # at first, what was written last is in memory below this machine, and is fio's
                    note("read", read)
                    note("read limit", plain)
            note("overwrite", count * length / seconds(lambda: fill(store, hashes[count:], rows)))
            note("overwrite limit", limit.bytes_per_s("write"))
            disk = store.stats().tiers["disk"]
            assert disk.drops == {}, disk.drops
            assert disk.evictions > count // 2
        note("open", seconds(lambda: BlockStore.open(config).close()))
    limit.path.unlink()
    figures: dict[str, object] = {"block": label}
    for name in ("write", "overwrite", "read"):
        limits = speeds[f"{name} limit"]
        figures[f"{name} GB/s"] = statistics.median(speeds[name]) / 1e9
        figures[f"{name} limit GB/s"] = statistics.median(limits) / 1e9
        shares = [ours / theirs for ours, theirs in zip(speeds[name], limits, strict=True)]
        figures[f"{name} share"] = statistics.median(shares)
    return {**figures, "open s": statistics.median(speeds["open"]), "blocks": count}


def fill(store: BlockStore, hashes: list[BlockHash], rows: np.ndarray) -> None:
    """Put all blocks and wait until they are on disk."""
    for start in range(0, len(hashes), BATCH):
        batch = range(start, min(start + BATCH, len(hashes)))
        assert all(store.put_many([(hashes[number], rows[number % len(rows)]) for number in batch]))
    assert store.flush()


def load(store: BlockStore, order: list[int], hashes: list[BlockHash], outs: list[np.ndarray]) -> None:
    """Get blocks in batches. The last ones written may still be in staging memory: at most 64 MiB of all."""
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        assert all(store.get_many([(hashes[number], out) for number, out in zip(batch, outs, strict=False)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; the temporary directory by default")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().directory) as made:
        table = [measure(label, length, Path(made)) for label, length in SIZES.items()]
    used = "fio" if shutil.which("fio") else "own loop"
    report(
        "disk tier against the disk", table, {"bytes": TOTAL_BYTES, "rounds": ROUNDS, "limit by": used, "seed": SEED}
    )
