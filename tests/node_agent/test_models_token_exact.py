"""Every family continues prompts exactly as transformers does, greedily in float32, whatever shares the step."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_loop import Run, generate
from transformers import AutoModelForCausalLM

from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.models.weights import LoadOptions

NEW_TOKENS = 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.1 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-9-of-3-heads-of-64": (
        "llama",
        {
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "hidden_size": 576,
            "head_dim": 64,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-rope-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-rope-dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "llama-rope-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama-sharded-files": ("llama", {"shard_size": "60KB"}),
    "mistral": ("mistral", {"tie_word_embeddings": True}),
    "mistral-window-shorter-than-prompts": ("mistral", {"sliding_window": 10}),
    "qwen2-tied": ("qwen2", {}),
    "qwen2-window-in-upper-layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": False},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-biases-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}


def mixed_prompts(vocab: int) -> list[list[int]]:
    """Lengths on both sides of a block and of the windows; two prompts begin alike."""
    source = random.Random(7)
    prompts = [[source.randrange(6, vocab) for _ in range(length)] for length in (1, 4, 37, 13, 61, 5)]
    return [*prompts, prompts[2][:30] + prompts[3]]


def reference_tokens(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        outputs.append(made[0, len(prompt) :].tolist())
    return outputs


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder.load(Checkpoint.open(folder), LoadOptions(torch.device("cpu"), dtype))


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(tiny_checkpoint: Callable[..., Path], case: str) -> None:
    family, overrides = CASES[case]
    folder = tiny_checkpoint(family, **overrides)
    decoder = load(folder)
    prompts = mixed_prompts(decoder.spec.vocab)
    runs = generate(decoder, prompts, new_tokens=NEW_TOKENS, chunk_tokens=16)
    assert [run.generated for run in runs] == reference_tokens(folder, prompts)


@pytest.mark.parametrize(
    "case", ["llama-gqa", "mistral-window-shorter-than-prompts", "qwen2-tied", "qwen3", "llama-9-of-3-heads-of-64"]
)
def test_logits_are_the_same_bits_alone_in_a_batch_and_in_any_chunks(
    tiny_checkpoint: Callable[..., Path], case: str
) -> None:
    family, overrides = CASES[case]
    decoder = load(tiny_checkpoint(family, **overrides))
    prompts = mixed_prompts(decoder.spec.vocab)
    alone = [generate(decoder, [prompt], new_tokens=6)[0] for prompt in prompts]
    for chunk_tokens in (1000, 17, 3):
        together = generate(decoder, prompts, new_tokens=6, chunk_tokens=chunk_tokens)
        assert all(same_bits(one, other) for one, other in zip(alone, together, strict=True))


def same_bits(one: Run, other: Run) -> bool:
    return one.tokens == other.tokens and torch.equal(torch.stack(one.logits), torch.stack(other.logits))
