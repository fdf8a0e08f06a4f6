"""What a decoder is made of, as one frozen value: all that the engine, the kernels and the store need to know of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

from spillway.node_agent.models.errors import UnsupportedModelError
from spillway.node_agent.models.rope import RotaryPositions, rotary_positions

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder: RMSNorm, causal attention, gated SiLU MLP. Sizes are of the whole model, not of one rank."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    positions: RotaryPositions
    max_positions: int
    """Longest context in tokens."""
    windows: tuple[int | None, ...]
    """[layers], how many keys up to its own a query of that layer sees; None means all."""
    qk_norm: bool = False
    """Whether each head of q and k is RMS-normalised before it is rotated."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """KV bytes of one token over all layers: 2 · layers · kv_heads · head_dim · dtype_bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes

    def weight_count(self) -> int:
        """How many numbers the model's weights hold; tied embeddings count once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (q + 2 * kv) + q * self.hidden
        attention += (q + 2 * kv) * self.qkv_bias + self.hidden * self.o_bias + 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.hidden * self.intermediate + (2 * self.intermediate + self.hidden) * self.mlp_bias
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return self.layers * (attention + mlp + 2 * self.hidden) + self.hidden + embeddings

    def positions_digest(self) -> bytes:
        """32 bytes that name how positions enter the KV: frequencies, their scaling, the layers' windows."""
        return hashlib.sha256(repr((self.positions, self.windows)).encode()).digest()


@dataclass(frozen=True, slots=True)
class WeightNames:
    """A family's weight names, without the ending ``.weight`` or ``.bias``; ``{}`` stands for the layer number."""

    embedding: str
    final_norm: str
    lm_head: str
    input_norm: str
    q: str
    k: str
    v: str
    o: str
    post_norm: str
    gate: str
    up: str
    down: str
    q_norm: str = ""
    k_norm: str = ""
    ignored: tuple[str, ...] = ()
    """Regular expressions of full names that old checkpoints carry and no one needs."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family: how its config becomes a spec, and what its weights are called."""

    model_type: str
    spec: Callable[[Any], DecoderSpec] = field(repr=False)
    names: WeightNames = field(repr=False)
    config: Any = field(default=AutoConfig, repr=False)
    """What reads its config.json, by `from_pretrained`."""


def base_spec(config: Any, windows: tuple[int | None, ...], **features: bool) -> DecoderSpec:
    """The spec from the config fields that all families share; `features` are the flags of `DecoderSpec`.

    Raises:
        UnsupportedModelError: a setting that cannot be run.
    """
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise UnsupportedModelError(f"the config's {name} must be at least 1, got {getattr(config, name)}")
    heads, kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    if heads % kv_heads:
        raise UnsupportedModelError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act {config.hidden_act!r} is not supported (supported: silu)")
    positions, max_positions = rotary_positions(config)
    return DecoderSpec(
        model_type=config.model_type,
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        intermediate=int(config.intermediate_size),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab=int(config.vocab_size),
        norm_eps=float(config.rms_norm_eps),
        positions=positions,
        max_positions=max_positions,
        windows=windows,
        tied_embeddings=bool(config.tie_word_embeddings),
        **features,
    )


def windows_by_layer_type(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window where the config names a type per layer (Qwen2, Qwen3).

    Raises:
        UnsupportedModelError: a layer type other than full or sliding attention, or not one per layer.
    """
    kinds = config.layer_types
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != config.num_hidden_layers:
        raise UnsupportedModelError(f"layer_types must name full or sliding attention for each layer, got {kinds}")
    if config.sliding_window is None and "sliding_attention" in kinds:
        raise UnsupportedModelError("layer_types name sliding attention, but sliding_window is not set")
    return tuple(int(config.sliding_window) if kind == "sliding_attention" else None for kind in kinds)
