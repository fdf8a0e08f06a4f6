"""What the benchmarks of the store share: blocks, rounds that alternate with their limit, tables and results."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.results import RESULTS, machine

from spillway.kvstore import BlockHash, KVIdentity, block_hash

Bytes = npt.NDArray[np.uint8]
IDENTITY = KVIdentity("benchmark", "bfloat16", "none", 16, (0, 32), 0, 1, "rope")
SIZES = {"64 KiB": 64 << 10, "512 KiB": 512 << 10, "2 MiB": 2 << 20}


def names(count: int) -> list[BlockHash]:
    """Names of ``count`` blocks."""
    return [block_hash(IDENTITY.root(), [number]) for number in range(count)]


def random_rows(rows: int, length: int, seed: int) -> Bytes:
    """A touched, page-aligned array ``[rows, length]`` of random bytes."""
    data = np.random.default_rng(seed).integers(0, 256, (rows, length), dtype=np.uint8)
    return np.ascontiguousarray(data)


def seconds(work: Callable[[], None]) -> float:
    """How long ``work`` takes once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a change of the machine's pace strikes all alike."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in taken.items()}


def _busy_s() -> float:
    """CPU seconds that all CPUs spent on something so far, stolen ones included."""
    user, nice, system, _, _, *rest = (int(field) for field in Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


_BEGUN = (time.monotonic(), _busy_s(), _own_s())


def company() -> float:
    """How many CPUs were busy, since this began, with other work than this process and its ended children."""
    now, busy_s, own_s = time.monotonic(), _busy_s(), _own_s()
    return max(0.0, (busy_s - _BEGUN[1] - (own_s - _BEGUN[2])) / (now - _BEGUN[0]))


def report(title: str, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Print the machine, the settings and a table; keep all of it under `benchmarks/results/`."""
    others = company()
    described = machine() | {"busy_beside": round(others, 2), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    print(f"{title}\n{described['processor']}, {described['cpus']} CPUs, {described['system']}")
    print(f"{others:.2f} CPUs were busy with something else meanwhile")
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    columns = list(rows[0])
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[at]) for line in cells)) for at, column in enumerate(columns)]
    for line in (columns, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    path = RESULTS / f"kvstore-{Path(sys.argv[0]).stem.replace('_', '-')}.json"
    kept = {"title": title, "machine": described, "settings": settings, "rows": list(rows)}
    path.write_text(json.dumps(kept, indent=1) + "\n")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return "" if value is None else str(value)
