#!/usr/bin/env python3
"""The long chaos run: minutes of load and faults on stores that share a Redis; its findings as a table and as data.

    python tests/chaos/long.py --seed 1 --operations 1000000

An operation is one block asked for, put, looked up, prefetched or dropped. The result goes to `benchmarks/results/`.
The exit status is 1 if the store broke its word.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import msgspec
from harness.results import RESULTS, machine
from storechaos.chaos import Length, chaos
from storechaos.driver import Report
from storechaos.ground import missing


def table(report: Report) -> str:
    """For people."""
    counts = report.counts
    lines = [
        f"seed {report.seed}: {counts.operations:,} block operations in {report.rounds} rounds, {report.seconds:.0f} s",
        f"  hits {counts.hits:,}, misses {counts.misses:,}, kept {counts.kept:,}, not kept {counts.not_kept:,}",
        f"  slowest get {counts.slowest_get_s:.2f} s, slowest put {counts.slowest_put_s:.2f} s, frozen time included",
        f"  wrong bytes {counts.wrong}, late writes {counts.written_late}, entries in the index at the end "
        f"{report.entries:,}, a dead node's entries gone after {report.cleaned_s:.1f} s, "
        f"blocks read after kill -9 of all {report.survivors:,}",
        f"  {'fault':<22}{'strikes':>8}{'shown':>7}  by",
    ]
    for fault in report.faults:
        shown = "-" if fault.shown is None else str(fault.shown)
        said = fault.left_out or ", ".join(fault.by) or "nothing goes by it"
        lines.append(f"  {fault.kind:<22}{fault.strikes:>8}{shown:>7}  {said}")
    verdict = [f"  VIOLATION: {each}" for each in report.violations] or ["  no violation"]
    return "\n".join(lines + verdict)


def main() -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--round-s", type=float, default=2.0, help="length of a round of faults, in seconds")
    parser.add_argument("--most-s", type=float, default=1800.0, help="seconds after which it is enough")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args()
    if lacks := missing():
        sys.stderr.write(f"{lacks}\n")
        return 2
    logs = Path(tempfile.mkdtemp(prefix="chaos-logs-"))
    length = Length(options.operations, options.workers, options.round_s, options.most_s, options.most_s + 600)
    report = chaos(options.seed, length, logs)
    print(table(report))
    print(f"  logs in {logs}")
    if options.keep:
        command = " ".join(["python tests/chaos/long.py", *sys.argv[1:]])
        redis = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout.split()
        versions = {"python": sys.version.split()[0], "redis-server": redis[2][2:], "redis": version("redis")}
        about = {"machine": machine(), "versions": versions, "command": command}
        path = RESULTS / f"chaos-seed-{options.seed}.json"
        path.write_text(json.dumps(about | msgspec.to_builtins(report), indent=1) + "\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
