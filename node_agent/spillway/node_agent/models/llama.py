"""Llama 2 and 3, and what follows their architecture (SmolLM2, TinyLlama, …)."""

from __future__ import annotations

from typing import Any

from spillway.node_agent.models.spec import DecoderSpec, Family, WeightNames, base_spec

NAMES = WeightNames(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    lm_head="lm_head",
    input_norm="model.layers.{}.input_layernorm",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    o="model.layers.{}.self_attn.o_proj",
    post_norm="model.layers.{}.post_attention_layernorm",
    gate="model.layers.{}.mlp.gate_proj",
    up="model.layers.{}.mlp.up_proj",
    down="model.layers.{}.mlp.down_proj",
    q_norm="model.layers.{}.self_attn.q_norm",
    k_norm="model.layers.{}.self_attn.k_norm",
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
"""The names that Mistral and Qwen took over."""


def _spec(config: Any) -> DecoderSpec:
    bias = bool(config.attention_bias)
    windows = (None,) * config.num_hidden_layers
    return base_spec(config, windows, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias))


FAMILY = Family("llama", _spec, NAMES)
