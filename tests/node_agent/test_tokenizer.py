"""Prompts and chats become the tokens transformers makes of them; text grows in pieces that never have to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spillway.node_agent.checkpoint import load_config
from spillway.node_agent.models.errors import ChatTemplateError, TokenizerError
from spillway.node_agent.tokenizer import Detokenizer, Tokenizer


def byte_level() -> Tokenizer:
    """As in Llama 3, Qwen and SmolLM2."""
    return Tokenizer(make_tokenizer(), frozenset({1}))


def byte_fallback() -> Tokenizer:
    """As in Llama 2 and Mistral: pieces with ▁ for a space, and one token for each byte that no piece covers."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁a", "a", "b", "▁b", "ab", "é", "你", "\n", "�", "<|tool|>"]
    backend = Backend(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a"), ("▁", "b"), ("a", "b")], byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Tokenizer(fast, frozenset({2}))


KINDS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}
VOCAB = {"byte-level": 384, "byte-fallback": 3 + 256 + 11}


def grown(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*[detokenizer.push(token) for token in ids], detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_any_tokens_add_up_to_the_whole_decoded_at_once(kind: str, data: st.DataObject, skip: bool) -> None:
    vocab = VOCAB[kind]
    some_bytes = st.integers(0, 259)  # often enough bytes of one character, or of none
    ids = data.draw(st.lists(st.one_of(some_bytes, st.integers(0, vocab - 1)), max_size=24))
    pieces = grown(KINDS[kind], ids, skip_special_tokens=skip)
    assert "".join(pieces) == KINDS[kind].decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_no_piece_but_the_last_ends_within_a_character(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    pieces = grown(tokenizer, tokenizer.encode(text), skip_special_tokens=True)
    whole = tokenizer.decode(tokenizer.encode(text))
    assert "".join(pieces) == whole
    assert all(piece.count("�") <= text.count("�") for piece in pieces)


def test_a_character_of_several_tokens_comes_out_when_it_is_complete() -> None:
    tokenizer = KINDS["byte-level"]
    ids = tokenizer.encode("x🙈y", add_special_tokens=False)
    assert len(ids) > 3, "the point of this test is a character of several tokens"
    pieces = grown(tokenizer, ids, skip_special_tokens=True)
    assert [piece for piece in pieces if piece] == ["x", "🙈", "y"]


def test_special_tokens_show_only_when_asked_for() -> None:
    tokenizer = KINDS["byte-level"]
    ids = [*tokenizer.encode("a"), 1, *tokenizer.encode("b")]
    assert "".join(grown(tokenizer, ids, skip_special_tokens=True)) == "ab"
    assert "".join(grown(tokenizer, ids, skip_special_tokens=False)) == "a<eos>b"


@pytest.mark.parametrize(
    ("kind", "piece", "text", "raw"),
    [
        ("byte-level", "Ġthe", " the", b" the"),
        ("byte-level", "Ã", "�", b"\xc3"),
        ("byte-level", "<eos>", "<eos>", b"<eos>"),
        ("byte-fallback", "▁a", " a", b" a"),
        ("byte-fallback", "<0xE4>", "�", b"\xe4"),
        ("byte-fallback", "<0x41>", "A", b"A"),
        ("byte-fallback", "你", "你", "你".encode()),
        ("byte-fallback", "�", "�", "�".encode()),
    ],
)
def test_one_token_as_text_and_as_bytes(kind: str, piece: str, text: str, raw: bytes) -> None:
    tokenizer = KINDS[kind]
    number = tokenizer._backend.token_to_id(piece)
    assert tokenizer.token_text(number) == (text, raw)
    assert tokenizer.token_text(number) == (text, raw), "from the cache, too"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = KINDS["byte-level"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_text(token)[1] for token in ids) == text.encode()


def test_prompts_and_chats_are_encoded_as_transformers_does(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama")
    ours, reference = Tokenizer.load(folder, load_config(folder)), AutoTokenizer.from_pretrained(folder)
    text = "The quick brown fox, naïve: 数値 🙂"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    assert ours.encode(text) == reference(text)["input_ids"]
    assert ours.encode_many([text, "", "b"]) == reference([text, "", "b"])["input_ids"]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages, {}) == expected
    assert ours.render_chat(messages, {"add_generation_prompt": False}).endswith("<eos>")


def test_a_saved_length_limit_neither_cuts_nor_pads(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len(Tokenizer(tokenizer, frozenset()).encode("a b c d e f g h i j k l")) > 8


def test_template_options_reach_the_template_but_not_the_call(tmp_path: Path) -> None:
    template = "{% if loud %}!{% endif %}{{ messages[0]['content'] }}"
    tokenizer = Tokenizer(make_tokenizer(chat_template=template), frozenset())
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages, {"loud": True}) == "!x"
    for name in ("tokenize", "chat_template", "return_tensors", "conversation"):
        with pytest.raises(ChatTemplateError, match=name):
            tokenizer.render_chat(messages, {name: "anything"})


@pytest.mark.parametrize(
    ("template", "messages", "match"),
    [
        (None, [{"role": "user", "content": "x"}], "no chat template"),
        (CHAT_TEMPLATE, [{"role": "robot", "content": "x"}], "unknown role robot"),
        ("{{ messages[0]['content'] + 1 }}", [{"role": "user", "content": "x"}], "refuses"),
        ("{{ nothing.here }}", [{"role": "user", "content": "x"}], "refuses"),
    ],
)
def test_a_chat_that_cannot_be_rendered_says_why(template: str | None, messages: list[Any], match: str) -> None:
    with pytest.raises(ChatTemplateError, match=match):
        Tokenizer(make_tokenizer(chat_template=template), frozenset()).encode_chat(messages, {})


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {7, 8, 1}),
        ({"eos_token_id": 7}, {}, {7, 1}),
        (None, {"eos_token_id": 9}, {9, 1}),
        ({"temperature": 1.0}, {"eos_token_id": [9]}, {9, 1}),
        (None, {}, {1}),
    ],
)
def test_what_ends_a_sequence(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, generation: Any, config: Any, expected: set[int]
) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer.load(folder, load_config(folder)).eos_ids == expected


def test_a_folder_without_a_usable_tokenizer_is_a_typed_error(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(TokenizerError, match="eos_token_id"):
        Tokenizer.load(folder, load_config(folder))
    (folder / "tokenizer.json").write_text("{ not json")
    with pytest.raises(TokenizerError):
        Tokenizer.load(folder, load_config(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError):
        Tokenizer.load(folder, load_config(folder))
