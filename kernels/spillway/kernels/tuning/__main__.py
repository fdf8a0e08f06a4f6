"""The tuning command: ``python -m spillway.kernels.tuning`` on a machine with a GPU.

Compiles all candidate tiles ahead, times those that fit, and writes the best of each variant to the table of this GPU.
Variants that were not timed fall through to the table of the GPU's family.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from spillway.kernels.tuning.gpu import Gpu, gpu_of
from spillway.kernels.tuning.search import Workload, worth_timing
from spillway.kernels.tuning.tables import Tile, file_names, trying
from spillway.kernels.tuning.timing import graph_ms

WORKLOADS = [
    Workload("prefill", 128, 16, biased=False, sequences=2, tokens=8192),
    Workload("prefill", 64, 16, biased=False, sequences=2, tokens=8192),
    Workload("prefill", 256, 16, biased=False, sequences=1, tokens=8192),
    Workload("prefill", 128, 16, biased=True, sequences=1, tokens=8192),
    Workload("prefill", 128, 8, biased=False, sequences=1, tokens=8192),
    Workload("decode", 128, 16, biased=False, sequences=64, tokens=8192),
    Workload("decode", 64, 16, biased=False, sequences=64, tokens=8192),
    Workload("decode", 256, 16, biased=False, sequences=32, tokens=8192),
    Workload("decode", 128, 8, biased=False, sequences=64, tokens=8192),
]


def tune(gpu: Gpu, workload: Workload, keep: int = 5) -> list[tuple[float, Tile]]:
    """The best tiles of one workload with their milliseconds, best first."""
    call = workload.call("cuda")
    timed = []
    for tile in worth_timing(gpu, workload):
        with trying(tile):
            timed.append((graph_ms([call]), tile))
    return sorted(timed, key=lambda pair: pair[0])[:keep]


def entry(workload: Workload, tile: Tile, milliseconds: float) -> str:
    """One line of a table."""
    key = {"padded_dim": workload.head_dim, "operand_bits": 16, "pool_bits": workload.pool_bits}
    fields = [f"{name} = {value}" for name, value in {**key, **asdict(tile)}.items()]
    fields.insert(3, f"biased = {str(workload.biased).lower()}")
    return f"  {{ {', '.join(fields)} }},  # {milliseconds:.3f} ms"


def main() -> int:
    """Tune what is asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tables", help="folder of the table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning needs a CUDA device; none is here", file=sys.stderr)
        return 2
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    lines = [f"# Timed on {gpu.name}, torch {torch.__version__}. Best of the candidates in tuning/search.py.", ""]
    for op in ("prefill", "decode"):
        chosen = [w for w in WORKLOADS if w.op == op and op in options.ops and w.head_dim in options.head_dims]
        if not chosen:
            continue
        lines.append(f"{op} = [")
        for workload in chosen:
            print(workload, flush=True)
            best = tune(gpu, workload)
            for milliseconds, tile in best:
                print(f"  {milliseconds:8.3f} ms  {tile}", flush=True)
            lines.append(entry(workload, best[0][1], best[0][0]))
        lines += ["]", ""]
    file = options.out / file_names(gpu)[0]
    file.write_text("\n".join(lines))
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
