#!/usr/bin/env python3
"""The main job on a real model: many questions over a few long documents, with a KV pool that is far too small.

    make demo

Two batches ask different questions about the same documents. The first computes each document once and spills its KV
through host memory to disk; the second finds it there. All of it is the ordinary `spillway run`; the commands are shown.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "demo"
SPILLWAY = Path(sysconfig.get_path("scripts")) / "spillway"
BUDGETS = ["--device-kv", "160MiB", "--host-kv", "96MiB", "--disk-kv", "1GiB", "--disk-dir", str(OUT / "kv")]


def call(*command: str | Path) -> str:
    """Run a command, shown first; its standard output. Ends the demo if it fails."""
    shown = shlex.join(str(part) for part in command)
    print(f"\n$ {shown}", flush=True)
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    return finished.stdout


def run_part(model: str, part: str) -> dict[str, Any]:
    """One batch: make it, run it, show its answers. Returns the run's report."""
    batch, results, report = (OUT / f"{part}{ending}" for ending in (".jsonl", ".results.jsonl", ".report.json"))
    call(sys.executable, HERE / "documents" / "make_batch.py", batch, "--part", part)
    files = ["--model", model, "--input", str(batch), "--output", str(results), "--report", str(report)]
    call(SPILLWAY, "run", *files, *BUDGETS)
    print(call(sys.executable, HERE / "documents" / "show_answers.py", results))
    loaded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return loaded


def main() -> int:
    """Fetch the model if need be, run both parts, and say what the numbers show."""
    print("Spillway demo: SmolLM2-135M-Instruct on this machine's CPU; a few minutes on two cores.")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    model = call(sys.executable, HERE / "fetch_smollm2.py").strip().splitlines()[-1]
    first, second = run_part(model, "first"), run_part(model, "second")
    print("What to see here")
    for name, report in (("first", first), ("second", second)):
        tiers = report["store"]["tiers"]
        print(
            f"  {name:6}  {report['prefix_hit_share']:6.1%} of prompt tokens were not computed again; "
            f"{tiers['disk']['stores']} blocks written to disk, "
            f"{tiers['host']['hits']} fetched from host and {tiers['disk']['hits']} from disk, "
            f"{sum(tier['verify_failures'] for tier in tiers.values())} failed verification; "
            f"{report['run_s']:.0f} s at {report['tokens_per_s']:,.0f} tokens/s"
        )
    print(f"  Results and reports are in {OUT}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
