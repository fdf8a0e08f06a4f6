"""The rate to measure a batch against: matmuls of the model's own shapes, in GFLOP/s; on a CPU packed oneDNN ones.

Every layer's weights are gone through in turn, as in a real step, so none is in the cache when it is used.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contract import Task, read_task
from hf_model import can_pack
from transformers import AutoConfig

SECONDS = 4.0
ROWS = {"cpu": 512, "cuda": 4096}
"""Of a step: enough for the rate to have levelled off."""


def shapes_of(config: Any) -> list[tuple[int, int]]:
    """(in, out) of a layer's qkv, output, gate-up and down projections."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    return [
        (hidden, (heads + 2 * kv_heads) * head_dim),
        (heads * head_dim, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    ]


def product(depth: int, width: int, dtype: torch.dtype, device: str) -> Callable[[torch.Tensor], object]:
    """A random weight as the device multiplies it fastest."""
    if device == "cuda":
        dense = torch.randn(width, depth, device=device).mul_(0.02).to(dtype)
        return lambda x: torch.mm(x, dense.t())
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(torch.randn(width, depth).to(dtype) * 0.02, ROWS[device])
    return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")


@torch.inference_mode()
def gflop_s(config: Any, dtype: torch.dtype, device: str) -> float:
    """Best rate of three spells of `SECONDS` each over all layers."""
    shapes, rows = shapes_of(config), ROWS[device]
    layers = [[product(*shape, dtype, device) for shape in shapes] for _ in range(config.num_hidden_layers)]
    inputs = [torch.randn(rows, depth, device=device).to(dtype) for depth, _ in shapes]
    flops = sum(2 * rows * depth * width for depth, width in shapes) * config.num_hidden_layers
    best = 0.0
    for _ in range(3):
        passes, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            for layer in layers:
                for multiply, x in zip(layer, inputs, strict=True):
                    multiply(x)
            if device == "cuda":
                torch.cuda.synchronize()
            passes += 1
        best = max(best, passes * flops / (time.perf_counter() - started))
    return best / 1e9


def dtype_of(task: Task) -> torch.dtype:
    """The task's dtype; float32 on a CPU that cannot multiply in it."""
    dtype: torch.dtype = getattr(torch, task.dtype)
    return dtype if task.device == "cuda" or can_pack(dtype) else torch.float32


def main() -> None:
    """Measure for the task's model, dtype and device."""
    task = read_task(Path(sys.argv[1]))
    torch.set_num_threads(task.threads)
    dtype = dtype_of(task)
    rate = gflop_s(AutoConfig.from_pretrained(task.model), dtype, task.device)
    Path(sys.argv[2]).write_text(json.dumps({"gflop_s": rate, "dtype": str(dtype).removeprefix("torch.")}))


if __name__ == "__main__":
    main()
