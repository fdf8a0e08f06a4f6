#!/usr/bin/env python3
"""What verification costs: xxh3 of a block as a share of copying it and of moving it to and from disk.

    python benchmarks/kvstore/checksum.py [--directory DIR]

The copy and the disk accesses are bare: `numpy.copyto`, and `os.pwritev` and `os.preadv` past the page cache, each with
one thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from figures import SIZES, alternate, random_rows, report

from spillway.kvstore.buffers import aligned
from spillway.kvstore.header import checksum_of
from spillway.kvstore.tiers.disk.files import open_file, read_all, supports_direct_io, write_all

TOTAL_BYTES = 128 << 20
ROUNDS = 9
SEED = 1


def measure(label: str, length: int, directory: Path) -> dict[str, object]:
    """One row: GB/s of each, and the checksum's time as a share of the others'."""
    count = TOTAL_BYTES // length
    source = aligned(TOTAL_BYTES)
    source[:] = random_rows(1, TOTAL_BYTES, SEED)[0]
    rows, copied = source.reshape(count, length), np.zeros((count, length), np.uint8)
    buffer = aligned(length)
    descriptor = open_file(directory / "bytes", direct=supports_direct_io(directory), create=True)
    os.posix_fallocate(descriptor, 0, TOTAL_BYTES)

    def each(action: Callable[[int], object]) -> Callable[[], list[object]]:
        return lambda: [action(row) for row in range(count)]

    works = {
        "checksum": each(lambda row: checksum_of(rows[row])),
        "copy": each(lambda row: np.copyto(copied[row], rows[row])),
        "write": each(lambda row: write_all(descriptor, [rows[row]], row * length)),
        "read": each(lambda row: read_all(descriptor, [buffer], row * length)),
    }
    try:
        taken = alternate(works, ROUNDS)
    finally:
        os.close(descriptor)
        (directory / "bytes").unlink()
    return {
        "block": label,
        **{f"{name} GB/s": TOTAL_BYTES / value / 1e9 for name, value in taken.items()},
        "of copy": taken["checksum"] / taken["copy"],
        "of disk write": taken["checksum"] / taken["write"],
        "of disk read": taken["checksum"] / taken["read"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; the temporary directory by default")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().directory) as made:
        table = [measure(label, length, Path(made)) for label, length in SIZES.items()]
    report("checksum against copy and disk", table, {"bytes": TOTAL_BYTES, "rounds": ROUNDS, "seed": SEED})
