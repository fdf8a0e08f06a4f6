"""Qwen2 and Qwen2.5: biases on q, k and v; the last layers may use a sliding window."""

from __future__ import annotations

from typing import Any

from spillway.node_agent.models.llama import NAMES
from spillway.node_agent.models.spec import DecoderSpec, Family, base_spec, windows_by_layer_type


def _spec(config: Any) -> DecoderSpec:
    return base_spec(config, windows_by_layer_type(config), qkv_bias=True)


FAMILY = Family("qwen2", _spec, NAMES)
