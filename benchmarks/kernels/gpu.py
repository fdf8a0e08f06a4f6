#!/usr/bin/env python3
"""All GPU benchmarks in one run, kept as data: attention beside its peers, what moves memory, decode steps.

    python benchmarks/kernels/gpu.py [--only attention rows step] [--results FOLDER]

Some ten minutes on an H100, most of it compiling on the first run. A part that fails is named, its traceback is shown,
and the others go on; the exit code is then 1. `plot_gpu.py` draws the files.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import attention_gpu
import rows_gpu
import step_gpu
from gpu_ground import RESULTS, Report, start

PARTS: dict[str, Callable[[Report], None]] = {
    "attention": attention_gpu.run,
    "rows": rows_gpu.run,
    "step": step_gpu.run,
}


def main() -> int:
    """Run what is asked for; every part keeps what it measured, even if it breaks off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    first, failed = start(), []
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        report = Report(first.hardware, first.ceilings)
        try:
            PARTS[name](report)
        except Exception:  # noqa: BLE001 - the other parts are worth having
            traceback.print_exc()
            failed.append(name)
        report.write(options.results / f"{name}-gpu.json")
    if failed:
        print(f"broke off: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
