"""Rotary position embedding (Su et al. 2021) and its scalings, as plain numbers.

The frequencies come from transformers' own initialisers, so every scaling it knows reads its parameters in one way.
Two scalings change the frequencies once a sequence grows past a limit, which would make the KV of a shared prefix
depend on what follows it. Up to that limit they are fixed, so the limit becomes the model's longest context:
``dynamic`` (NTK) stops at ``max_position_embeddings``, ``longrope`` at ``original_max_position_embeddings``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spillway.node_agent.models.errors import UnsupportedModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
"""Scalings that can be run."""

_TABLE_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class RotaryPositions:
    """Where a token stands, told by rotating its query and key.

    Pair i of a head (elements i and i + rotary_dim/2) turns by ``position · inv_freq[i]`` radians, and
    cosine and sine are multiplied by ``attention_scaling``.
    """

    inv_freq: tuple[float, ...]
    """[rotary_dim / 2] angular frequencies, each exactly a float32."""
    attention_scaling: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head are rotated."""
        return 2 * len(self.inv_freq)

    def cos_sin_table(self, positions: int) -> torch.Tensor:
        """``[positions, rotary_dim]`` float32: the cosines of a position, then its sines.

        The angle is the float32 product that transformers forms; cosine and sine are taken in float64 and rounded
        once, so the table is the same on every machine (vector libraries differ in the last bit).
        """
        half = len(self.inv_freq)
        inv_freq = np.asarray(self.inv_freq, dtype=np.float32)
        table = np.empty((positions, 2 * half), dtype=np.float32)
        for start in range(0, positions, _TABLE_CHUNK):
            stop = min(start + _TABLE_CHUNK, positions)
            at = np.arange(start, stop, dtype=np.float32)
            angles = (at[:, None] * inv_freq).astype(np.float64)
            table[start:stop, :half] = np.cos(angles).astype(np.float32) * np.float32(self.attention_scaling)
            table[start:stop, half:] = np.sin(angles).astype(np.float32) * np.float32(self.attention_scaling)
        return torch.from_numpy(table)


def rotary_positions(config: Any) -> tuple[RotaryPositions, int]:
    """The rotation a transformers config asks for, and the longest context for which it is fixed, in tokens.

    Raises:
        UnsupportedModelError: an unknown scaling, one per layer type, or a rotation of a part of each head.
    """
    parameters = config.rope_parameters or {}
    rope_type = parameters.get("rope_type", "default")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError("rope_parameters differ by layer type: not supported")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(f"rope type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")
    inv_freq, scaling = _frequencies(config, rope_type)
    if not (torch.isfinite(inv_freq).all() and math.isfinite(scaling)):
        raise UnsupportedModelError(f"the rope parameters give frequencies that are no numbers: {parameters}")
    limit = int(config.max_position_embeddings)
    if rope_type == "longrope":
        limit = min(limit, int(parameters["original_max_position_embeddings"]))
    return RotaryPositions(tuple(inv_freq.to(torch.float32).tolist()), float(scaling)), limit


def _frequencies(config: Any, rope_type: str) -> tuple[torch.Tensor, float]:
    if rope_type == "default":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"]
        return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0
    try:
        return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnsupportedModelError(f"rope type {rope_type!r} with unusable parameters: {error!r}") from error
