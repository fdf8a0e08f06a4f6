#!/usr/bin/env python3
"""The main job on a real model: questions over shared documents, with far too little memory for the KV cache.

    python examples/demo.py            # or: make demo

Two batches ask different questions about the same four documents. The device pool holds the KV of one document and a
half, the host tier that of a third of one, so KV goes to disk. The second batch runs in a new process: it finds the
documents' KV on disk and reads it back, verified, instead of computing it again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "documents")]

from fetch_smollm2 import FetchError, default_cache, fetch  # noqa: E402 - found by the line above
from make_batch import interleaved, questions  # noqa: E402 - found by the line above
from show_answers import answers, report  # noqa: E402 - found by the line above

BUDGETS = ("--device-kv", "128MiB", "--host-kv", "32MiB", "--disk-kv", "2GiB")
RUNS = {"first": "1. Nothing cached yet", "second": "2. A new process, other questions, the same documents"}


def run(part: str, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Answer one part's questions with `spillway run`, and return its report.

    Raises:
        subprocess.CalledProcessError: the run failed; it has said why.
    """
    batch, results, numbers = (out / f"{part}{end}" for end in (".jsonl", "-results.jsonl", "-report.json"))
    lines = (json.dumps(question.line(), ensure_ascii=False) + "\n" for question in interleaved(questions(part)))
    batch.write_text("".join(lines), encoding="utf-8")
    command = ["spillway", "run", "--model", str(checkpoint), "--input", str(batch), "--output", str(results)]
    command += [*BUDGETS, "--disk-dir", str(out / "kv"), "--report", str(numbers)]
    print(f"\n{RUNS[part]}\n$ {' '.join(command)}\n", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("spillway")), *command[1:]], check=True)
    loaded: dict[str, Any] = json.loads(numbers.read_text())
    return loaded


def comparison(reports: dict[str, dict[str, Any]]) -> str:
    """The two runs' figures side by side."""

    def tier(each: dict[str, Any], name: str, field: str) -> int:
        return int(each["store"]["tiers"][name][field])

    rows = {
        "prompt tokens": lambda each: f"{each['prompt_tokens']:,}",
        "  found in the KV cache": lambda each: f"{each['prefix_hit_share']:.1%}",
        "KV blocks spilled to host": lambda each: f"{tier(each, 'host', 'stores'):,}",
        "KV blocks spilled to disk": lambda each: f"{tier(each, 'disk', 'stores'):,}",
        "KV blocks back from host": lambda each: f"{tier(each, 'host', 'hits'):,}",
        "KV blocks back from disk": lambda each: f"{tier(each, 'disk', 'hits'):,}",
        "  of which failed verification": lambda each: (
            f"{sum(tier(each, n, 'verify_failures') for n in ('host', 'disk'))}"
        ),
        "seconds, model loading apart": lambda each: f"{each['run_s']:.1f}",
    }
    lines = [f"{'':32}{'first run':>14}{'second run':>14}"]
    lines += [f"{name:32}" + "".join(f"{show(each):>14}" for each in reports.values()) for name, show in rows.items()]
    return "\n".join(lines)


def main() -> int:
    """Fetch the model, run both batches, print the answers and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "demo", help="(default: %(default)s)")
    out = parser.parse_args().out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        checkpoint = fetch(default_cache())
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        reports = {part: run(part, checkpoint, out) for part in RUNS}
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    for part in RUNS:
        print(report(questions(part), answers(out / f"{part}-results.jsonl")))
    print(f"\n{comparison(reports)}\n\nEverything is in {out}: batch files, results, reports, and the KV on disk.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
