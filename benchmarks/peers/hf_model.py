"""A transformers model on the task's device; on a CPU with its linears packed for oneDNN, the fastest there."""

from __future__ import annotations

from typing import Any

import torch
from contract import Task
from transformers import AutoModelForCausalLM


def load_model(task: Task, **settings: Any) -> Any:
    """The task's model in its dtype on its device, in evaluation mode, linears packed if options say so."""
    torch.set_num_threads(task.threads)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype), **settings).eval()
    model = model.to(task.device)
    if task.options.get("linears") == "packed" and can_pack(model.dtype):
        pack_linears(model)
    return model


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype here: bfloat16 takes instructions that not every CPU has."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(64, 64, dtype=dtype), 64)
    except RuntimeError:
        return False
    return True


@torch.inference_mode()
def pack_linears(model: Any) -> None:
    """Replace each linear's forward by oneDNN's on a weight laid out beforehand (MKL is slow on some CPUs)."""
    ops = torch.ops.mkldnn
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        packed = ops._reorder_linear_weight(module.weight.detach(), 64)
        module.forward = lambda x, weight=packed, bias=module.bias: ops._linear_pointwise(
            x, weight, bias, "none", [], ""
        )
        if id(module.weight) not in embeddings:
            module.weight.data = torch.empty(0)


def generate(model: Any, lines: list[Any]) -> list[list[int]]:
    """One left-padded batch, greedy, run to its longest output and cut to each line's."""
    width = max(len(line.prompt) for line in lines)
    steps = max(line.max_tokens for line in lines)
    ids = torch.tensor([[0] * (width - len(line.prompt)) + line.prompt for line in lines])
    mask = torch.tensor([[0] * (width - len(line.prompt)) + [1] * len(line.prompt) for line in lines])
    ids, mask = ids.to(model.device), mask.to(model.device)
    with torch.inference_mode():
        rows = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            pad_token_id=0,
            eos_token_id=None,
        )
    return [row[width : width + line.max_tokens].tolist() for row, line in zip(rows, lines, strict=True)]
