#!/usr/bin/env python3
"""The CPU path's packed linear beside packed oneDNN and MKL (`F.linear`), over the shapes of two models.

    python benchmarks/kernels/cpu_linear.py [--threads N] [--seconds S] [--rows 1,8,...]

All of a cell's contenders take turns in bursts of about a millisecond for ``--seconds``; the best of each counts, since
a machine that is shared is only ever slower. GFLOP/s are 2 * rows * in * out over the time of a call from Python. The
"error" is the root mean square against float64, relative to the result's. The weights are read from wherever they lie:
where those of one layer fit the last-level cache, they stay there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.results import RESULTS, machine

from spillway.kernels.cpu.linear import PackedLinear

# (in, out): SmolLM2-135M's, then those of a 206M Llama
SHAPES = [
    (576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152),
    (1024, 2048), (1024, 1024), (1024, 5632), (2816, 1024), (1024, 8192),
]  # fmt: skip
ROWS = [1, 8, 16, 32, 64, 96, 128, 256, 512]
Work = Callable[[Tensor], Tensor]


def contenders(weight: Tensor) -> dict[str, Work]:
    """What is compared, by name."""
    own, own_half = PackedLinear.pack(weight), PackedLinear.pack(weight.bfloat16())
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return {
        "spillway": own,
        "spillway bf16 weights": own_half,
        "oneDNN packed": lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        "F.linear": lambda x: functional.linear(x, weight),
    }


def best_seconds(works: dict[str, Work], x: Tensor, seconds: float) -> dict[str, float]:
    """Shortest time per call of each."""
    calls = max(1, int(1e-3 * 2e11 / (2 * x.numel() * next(iter(works.values()))(x).shape[1])))
    best = dict.fromkeys(works, float("inf"))
    for work in works.values():
        work(x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, work in works.items():
            start = time.perf_counter()
            for _ in range(calls):
                work(x)
            best[name] = min(best[name], (time.perf_counter() - start) / calls)
    return best


def error(work: Work, x: Tensor, weight: Tensor) -> float:
    expected = x.double() @ weight.double().T
    return float((work(x) - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    for inputs, outputs in SHAPES:
        weight = torch.randn(outputs, inputs) / inputs**0.5
        works = contenders(weight)
        errors = {name: error(works[name], torch.randn(16, inputs), weight) for name in ("spillway", "oneDNN packed")}
        print(f"{inputs} -> {outputs}  error " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
        for rows in options.rows:
            taken = best_seconds(works, torch.randn(rows, inputs), options.seconds)
            rates = {name: 2e-9 * rows * inputs * outputs / value for name, value in taken.items()}
            results.append({"in": inputs, "out": outputs, "rows": rows, "gflop_s": rates})
            ratio = rates["spillway"] / rates["oneDNN packed"]
            print(f"{rows:6}  " + "  ".join(f"{name} {rate:6.1f}" for name, rate in rates.items()) + f"  ({ratio:.2f})")
    described = {"machine": machine(), "torch": torch.__version__, "threads": options.threads, "cells": results}
    (RESULTS / "kernels-cpu-linear.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
