"""Qwen3: RMSNorm on each head of q and k, a head size of its own; the last layers may use a sliding window."""

from __future__ import annotations

from typing import Any

from spillway.node_agent.models.llama import NAMES
from spillway.node_agent.models.spec import DecoderSpec, Family, base_spec, windows_by_layer_type


def _spec(config: Any) -> DecoderSpec:
    bias = bool(config.attention_bias)
    return base_spec(config, windows_by_layer_type(config), qk_norm=True, qkv_bias=bias, o_bias=bias)


FAMILY = Family("qwen3", _spec, NAMES)
