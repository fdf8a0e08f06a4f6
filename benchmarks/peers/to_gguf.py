"""A Llama checkpoint as a GGUF file for llama.cpp: `to_gguf.py CHECKPOINT OUT.gguf float32|bfloat16`.

llama.cpp rotates neighbouring pairs of a head's rows where the checkpoint rotates halves, so the rows of the query and
key projections change places. No tokenizer is written: the benchmark speaks in token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
KIND = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}


def renamed(name: str) -> str:
    """The GGUF name of a checkpoint weight."""
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.weight"


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """`[heads · D, H]` with row i of a head's first half beside row i of its second half."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def main() -> None:
    """Convert."""
    source, target, kind = Path(sys.argv[1]), Path(sys.argv[2]), KIND[sys.argv[3]]
    config = json.loads((source / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, weight in load_file(source / "model.safetensors").items():
        new_name = renamed(name)
        part = new_name.split(".")[-2]
        values = np.ascontiguousarray(interleaved(weight, heads[part]) if part in heads else weight)
        if values.ndim == 1 or kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(new_name, values)
        else:
            writer.add_tensor(new_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


if __name__ == "__main__":
    main()
