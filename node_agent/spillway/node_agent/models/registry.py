"""Which model types can be run, and the way from a transformers config to a spec."""

from __future__ import annotations

from typing import Any

from spillway.node_agent.models import llama, mistral, qwen2, qwen3
from spillway.node_agent.models.errors import UnsupportedModelError
from spillway.node_agent.models.spec import DecoderSpec, Family

_FAMILIES = {family.model_type: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)}


def family_of(model_type: str) -> Family:
    """The family of a config's ``model_type``.

    Raises:
        UnsupportedModelError: none of ours; the message lists those that are.
    """
    family = _FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(f"model type {model_type!r} is not supported (supported: {', '.join(_FAMILIES)})")
    return family


def spec_of(config: Any) -> DecoderSpec:
    """The spec of a transformers config.

    Raises:
        UnsupportedModelError: an unknown family, quantized weights, or a setting that cannot be run.
    """
    family = family_of(config.model_type)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(f"quantized checkpoints are not supported (quantization_config: {method})")
    try:
        return family.spec(config)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"config.json has settings that make no sense: {error!r}") from error
