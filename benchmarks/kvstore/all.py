#!/usr/bin/env python3
"""The benchmarks of the store that want a quiet machine, one after the other, and the tables in docs/kv.md from them.

    python benchmarks/kvstore/all.py [--directory DIR]       # DIR on the disk to measure; a quarter of an hour

Each result says how many CPUs were busy with something else meanwhile. `planning.py` counts, and may run any time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ON_DISK = ("disk", "checksum")
SCRIPTS = ("host_copy", "checksum", "disk", "peer", "lookup", "node_loss")


def main() -> int:
    """1 if one of them failed; the others are run all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; the temporary directory by default")
    directory = parser.parse_args().directory
    failed = []
    for name in SCRIPTS:
        options = ["--directory", str(directory)] if directory and name in ON_DISK else []
        start = time.monotonic()
        done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], check=False)
        print(f"{name}: {time.monotonic() - start:.0f} s{'' if done.returncode == 0 else ', FAILED'}\n", flush=True)
        if done.returncode:
            failed.append(name)
    subprocess.run([sys.executable, str(HERE.parent / "offline.py"), "docs"], check=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
