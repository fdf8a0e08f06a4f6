"""transformers `generate` at its best: lines sorted, static cache, packed oneDNN linears.

Batches are chosen by a small cost model, since padding to the longest prompt and running to the longest output is
what costs `generate` most on mixed lengths: prefill by its padded tokens, decoding by padded rows, by one pass over the
weights a step and by the padded cache.
"""

from __future__ import annotations

from contract import Line, Run, Task, serve
from hf_model import generate, load_model

GFLOP_S, BYTES_S = 150e9, 18e9


def batches(lines: list[Line], size: int, by: str) -> list[list[int]]:
    """Line numbers in batches of `size`, neighbours alike in prompt or output length."""

    def key(number: int) -> tuple[int, int]:
        lengths = (len(lines[number].prompt), lines[number].max_tokens)
        return lengths if by == "prompt" else lengths[::-1]

    order = sorted(range(len(lines)), key=key, reverse=True)
    return [order[at : at + size] for at in range(0, len(order), size)]


def cost_s(lines: list[Line], plan: list[list[int]], parameters: int, kv_token_bytes: int) -> float:
    """Rough seconds that `generate` needs for these batches, on a CPU of the rates above."""
    total = 0.0
    for batch in plan:
        rows, width = len(batch), max(len(lines[number].prompt) for number in batch)
        steps = max(lines[number].max_tokens for number in batch)
        computed = rows * (width + steps) * 2 * parameters / GFLOP_S
        moved = steps * (4 * parameters + rows * (width + steps) * kv_token_bytes) / BYTES_S
        total += computed + moved
    return total


def load(task: Task) -> Run:
    """The model, and batches chosen for the lines at hand."""
    model = load_model(task)
    model.generation_config.cache_implementation = "static"
    model.generation_config.disable_compile = True
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4

    def run(lines: list[Line]) -> list[list[int]]:
        plans = [batches(lines, size, by) for size in (8, 16, 32, 64, 128) for by in ("prompt", "output")]
        plan = min(plans, key=lambda each: cost_s(lines, each, parameters, kv_token_bytes))
        outputs: list[list[int]] = [[] for _ in lines]
        for batch in plan:
            for number, tokens in zip(batch, generate(model, [lines[n] for n in batch]), strict=True):
                outputs[number] = tokens
        return outputs

    return run


if __name__ == "__main__":
    serve(load)
