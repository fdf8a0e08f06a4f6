#!/usr/bin/env python3
"""Bars of a GPU result file.

python benchmarks/kernels/plot_gpu.py benchmarks/results/attention-gpu.json docs/attention-gpu.svg
"""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """One panel per section and case, one bar per contender, the share of the ceiling written on it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    run = json.loads(options.results.read_text())
    records = [record for record in run["records"] if record["ms"] is not None]
    panels = [(name, list(group)) for name, group in groupby(records, key=lambda r: (r["section"], r["case"]))]
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(15, 2.1 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((section, case), group) in zip(axes.flat, panels, strict=False):
        draw(axis, f"{section}: {case}", group)
    hardware, ceilings = run["hardware"], run["ceilings"]
    figure.suptitle(
        f"{hardware['gpu']}, torch {hardware['torch']}, triton {hardware['triton']}; in the same run "
        f"{ceilings['copy_gb_s']:.0f} GB/s copy, {ceilings['matmul_tflop_s']:.0f} TFLOP/s bf16 matmul"
    )
    figure.savefig(options.picture)


def draw(axis: Any, title: str, group: list[dict[str, Any]]) -> None:
    """One panel: rates as bars."""
    colors = ["tab:blue" if record["name"].startswith(("spillway", "blocks")) else "tab:gray" for record in group]
    bars = axis.barh([record["name"] for record in group], [record["rate"] for record in group], color=colors)
    axis.bar_label(bars, [f"{record['rate']:.0f} ({100 * record['share']:.0f} %)" for record in group], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_title(title, fontsize=8)
    axis.tick_params(labelsize=7)


if __name__ == "__main__":
    main()
