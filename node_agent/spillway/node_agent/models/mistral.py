"""Mistral: Llama with one sliding window for all layers (none in later releases)."""

from __future__ import annotations

from typing import Any

from spillway.node_agent.models.llama import NAMES
from spillway.node_agent.models.spec import DecoderSpec, Family, base_spec


def _spec(config: Any) -> DecoderSpec:
    window = None if config.sliding_window is None else int(config.sliding_window)
    return base_spec(config, (window,) * config.num_hidden_layers)


FAMILY = Family("mistral", _spec, NAMES)
