"""Configs as the families' authors published them: the arithmetic people know by heart comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from spillway.node_agent.checkpoint import load_config
from spillway.node_agent.models.registry import spec_of
from spillway.node_agent.models.spec import DecoderSpec

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "rope_scaling": None,
}
LLAMA_31_8B = {
    **LLAMA_2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MISTRAL_7B_V01 = {
    **LLAMA_2_7B,
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
QWEN25_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 21,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def spec(folder: Path, config: dict[str, Any]) -> DecoderSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return spec_of(load_config(folder))


@pytest.mark.parametrize(
    ("config", "millions", "kv_bytes", "head_dim", "window"),
    [
        (LLAMA_2_7B, 6738, 524288, 128, None),
        (LLAMA_31_8B, 8030, 131072, 128, None),
        (MISTRAL_7B_V01, 7242, 131072, 128, 4096),
        (QWEN25_05B, 494, 12288, 64, None),
        (QWEN3_06B, 596, 114688, 128, None),
    ],
    ids=["llama-2-7b", "llama-3.1-8b", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b"],
)
def test_published_sizes(
    tmp_path: Path, config: dict[str, Any], millions: int, kv_bytes: int, head_dim: int, window: int | None
) -> None:
    found = spec(tmp_path, config)
    assert round(found.weight_count() / 1e6) == millions
    assert found.kv_bytes_per_token(2) == kv_bytes, "in bfloat16"
    assert found.head_dim == head_dim
    assert set(found.windows) == {window}
    assert found.max_positions == config["max_position_embeddings"]


@pytest.mark.parametrize(
    "config",
    [
        LLAMA_2_7B,
        LLAMA_31_8B,
        MISTRAL_7B_V01,
        QWEN25_05B,
        QWEN3_06B,
        {**LLAMA_2_7B, "num_key_value_heads": 8, "head_dim": 64, "attention_bias": True, "mlp_bias": True},
        {**LLAMA_2_7B, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0}},
        {**QWEN25_05B, "use_sliding_window": True},
        *({"model_type": family} for family in ("llama", "mistral", "qwen2", "qwen3")),
    ],
    ids=lambda config: f"{config['model_type']}-{len(config)}",
)
def test_a_config_means_what_it_means_to_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    assert spec(tmp_path, config) == spec_of(AutoConfig.from_pretrained(tmp_path))


def test_rotation_that_would_change_with_the_length_bounds_the_context(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 8192}
    longrope = spec(tmp_path, {**LLAMA_31_8B, "rope_scaling": {"rope_type": "longrope", **factors}})
    assert longrope.max_positions == 8192
    dynamic = spec(tmp_path, {**LLAMA_31_8B, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    assert dynamic.max_positions == 131072


def test_the_table_of_a_position_does_not_depend_on_its_length(tmp_path: Path) -> None:
    positions = spec(tmp_path, LLAMA_31_8B).positions
    assert positions.cos_sin_table(100).equal(positions.cos_sin_table(9000)[:100])
