"""The models that are measured: a random Llama of 206 M parameters, and SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent.parent
RANDOM_MODEL = "llama-206m"
REAL_MODEL = "smollm2-135m"
MODELS = (RANDOM_MODEL, REAL_MODEL)


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs to know of a model."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def token_flops(self) -> int:
        """Of one token through all layers' linears; attention and the output head apart."""
        attention = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return 2 * self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_flops(self) -> int:
        """Of one sampled token through the output head."""
        return 2 * self.hidden * self.vocabulary

    def attention_flops(self, context: int) -> int:
        """Of one query token over `context` keys, all layers."""
        return 4 * self.layers * self.heads * self.head_dim * context

    def kv_token_bytes(self, element_bytes: int) -> int:
        """KV of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


def shape_of(checkpoint: Path) -> Shape:
    """The shape that a checkpoint's config tells."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
    )


def checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint of a model, made or fetched into `folder` the first time."""
    if name == RANDOM_MODEL:
        return _random_llama(folder / RANDOM_MODEL)
    sys.path.insert(0, str(CHECKOUT / "examples"))
    from fetch_smollm2 import default_cache, fetch

    return fetch(default_cache())


def _random_llama(target: Path) -> Path:
    """16 layers, 16 query and 8 KV heads of 64, 205.6 M parameters."""
    return _seeded(target, hidden=1024, inner=2816, layers=16, heads=16)


def tiny_llama(target: Path) -> Path:
    """Two layers of two heads: a step costs next to nothing."""
    return _seeded(target, hidden=64, inner=128, layers=2, heads=2)


def _seeded(target: Path, *, hidden: int, inner: int, layers: int, heads: int) -> Path:
    """A Llama of seeded random weights, a KV head to two heads, with a tokenizer of bytes, pairs and triples."""
    if target.is_dir():
        return target
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    LlamaForCausalLM(config).eval().save_pretrained(partial)
    _letters_tokenizer(config.vocab_size).save_pretrained(partial)
    partial.rename(target)
    return target


def _letters_tokenizer(size: int) -> Any:
    """A byte-level BPE of exactly `size` tokens, made without training: bytes, then pairs and triples of letters."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(first, second) for first in letters for second in letters]
    triples = [(first + second, third) for first, second in pairs for third in letters]
    merges = (pairs + triples)[: size - len(names)]
    names += [left + right for left, right in merges]
    tokenizer = Tokenizer(BPE(vocab={name: at for at, name in enumerate(names)}, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
