"""accelerate's offload around `generate`: weights wait in host memory or in a memory-mapped file, layer by layer."""

from __future__ import annotations

import torch
from accelerate import cpu_offload, disk_offload
from contract import Line, Run, Task, serve
from hf_model import generate, load_model

BATCH = 64


def load(task: Task) -> Run:
    """The model with its weights away, on the tier that the options name."""
    model = load_model(task)
    if task.options["tier"] == "disk":
        disk_offload(model, str(task.scratch / f"weights-{task.dtype}"), execution_device=torch.device("cpu"))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))

    def run(lines: list[Line]) -> list[list[int]]:
        order = sorted(range(len(lines)), key=lambda number: (lines[number].max_tokens, len(lines[number].prompt)))
        outputs: list[list[int]] = [[] for _ in lines]
        for at in range(0, len(order), BATCH):
            batch = order[at : at + BATCH]
            for number, tokens in zip(batch, generate(model, [lines[n] for n in batch]), strict=True):
                outputs[number] = tokens
        return outputs

    return run


if __name__ == "__main__":
    serve(load)
