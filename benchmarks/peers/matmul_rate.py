"""The rate to measure a batch against: packed oneDNN matmuls of the model's own shapes, in GFLOP/s.

Every layer's weights are gone through in turn, as in a real step, so none is in the cache when it is used.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from contract import read_task
from hf_model import can_pack
from transformers import AutoConfig

ROWS = 512
SECONDS = 4.0


@torch.inference_mode()
def packed_gflop_s(model: Path, dtype: torch.dtype) -> float:
    """Best rate of three spells of `SECONDS` each over the qkv, output, gate-up and down projections of all layers."""
    config = AutoConfig.from_pretrained(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = [
        (hidden, (heads + 2 * kv_heads) * head_dim),
        (heads * head_dim, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    ]
    ops = torch.ops.mkldnn
    layers = [
        [ops._reorder_linear_weight(torch.randn(width, depth).to(dtype) * 0.02, ROWS) for depth, width in shapes]
        for _ in range(config.num_hidden_layers)
    ]
    inputs = [torch.randn(ROWS, depth).to(dtype) for depth, _ in shapes]
    flops = sum(2 * ROWS * depth * width for depth, width in shapes) * config.num_hidden_layers
    best = 0.0
    for _ in range(3):
        passes, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            for layer in layers:
                for weight, x in zip(layer, inputs, strict=True):
                    ops._linear_pointwise(x, weight, None, "none", [], "")
            passes += 1
        best = max(best, passes * flops / (time.perf_counter() - started))
    return best / 1e9


def main() -> None:
    """Measure for the task's model and dtype; for float32 on a CPU that cannot multiply in the task's dtype."""
    task = read_task(Path(sys.argv[1]))
    torch.set_num_threads(task.threads)
    dtype = getattr(torch, task.dtype)
    dtype = dtype if can_pack(dtype) else torch.float32
    figures = {"gflop_s": packed_gflop_s(task.model, dtype), "dtype": str(dtype).removeprefix("torch.")}
    Path(sys.argv[2]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
