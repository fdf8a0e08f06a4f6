"""Llama 2 and 3, and what follows their architecture (SmolLM2, TinyLlama, …)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

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


@strict
class LlamaConfig(PreTrainedConfig):
    """What is read of a config, with transformers' own defaults.

    transformers' class of this name, alone among the families', drags in activations, attention masks and with them
    torch's compiler: two seconds and a hundred megabytes of each process. The name is what its tokenizers go by.
    `strict` checks what it is given by these annotations, and takes anything where they are strings: so this file does
    without the import that makes them so.
    """

    model_type = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self, **others: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**others)


def _spec(config: Any) -> DecoderSpec:
    bias = bool(config.attention_bias)
    windows = (None,) * config.num_hidden_layers
    return base_spec(config, windows, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias))


FAMILY = Family("llama", _spec, NAMES, LlamaConfig)
