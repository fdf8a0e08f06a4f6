"""A checkpoint's tokenizer: prompts and chats to token ids, token ids to text."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spillway.node_agent.models.errors import ChatTemplateError, TokenizerError

REPLACEMENT = "\ufffd"
"""What stands for bytes that are no character, or not yet one."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_CHAT_OPTIONS = {"add_generation_prompt", "continue_final_message"}
"""The only parameters of transformers' template call that a request may set; other names go to the template itself."""


class Tokenizer:
    """Encodes and decodes for one model. Thread-safe: nothing changes after loading but a cache of token texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids
        """Tokens that end a sequence."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # Some checkpoints ship with a length to cut or pad to; a prompt is never changed silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_ids = frozenset(
            number for number, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        self._texts: dict[int, tuple[str, bytes]] = {}
        self._before = self.encode("a", add_special_tokens=False)[:1]

    @classmethod
    def load(cls, folder: Path, config: Any) -> Tokenizer:
        """The tokenizer of a checkpoint folder with this transformers config.

        A sequence ends at what ``generation_config.json`` names, else ``config.json``, and at the tokenizer's own end
        token: fine-tuned checkpoints often update only one of the two.

        Raises:
            TokenizerError: none there, one that cannot be read, or one that only exists as Python code.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever transformers raises for files it cannot read
            reason = str(error).strip().split("\n")[0]
            raise TokenizerError(f"{folder} has no tokenizer that can be loaded: {reason}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TokenizerError(f"{type(tokenizer).__name__} is not supported", "Save it as tokenizer.json.")
        own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        return cls(tokenizer, frozenset([*_configured_eos_ids(folder), *own]))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, with what the model wants to see first (such as BOS) unless told otherwise."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text, on all cores unless ``TOKENIZERS_PARALLELISM`` is false."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
        """Token ids of a chat, ready for the assistant's answer.

        Args:
            messages: as in the OpenAI API.
            options: extra names for the template (such as ``enable_thinking``).

        Raises:
            ChatTemplateError: no template, a template that refuses the messages, or an option that is not one.
        """
        return self.encode(self.render_chat(messages, options), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The chat as text, by the checkpoint's own template; see `encode_chat`."""
        if self._tokenizer.chat_template is None:
            raise ChatTemplateError("the model's tokenizer has no chat template; use /v1/completions")
        reserved = _template_parameters() & options.keys() - _CHAT_OPTIONS
        if reserved:
            raise ChatTemplateError(f"chat_template_kwargs cannot set {', '.join(sorted(reserved))}")
        settings = {"add_generation_prompt": True, **options, "tokenize": False}
        try:
            return str(self._tokenizer.apply_chat_template([dict(message) for message in messages], **settings))
        except Exception as error:  # a template is code of the checkpoint
            raise ChatTemplateError(f"the chat template refuses the messages: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no character become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> tuple[str, bytes]:
        """One token as text (in the middle of a line, so with its leading space) and as bytes.

        A token that is a part of a character has U+FFFD in its text and its true bytes beside it.
        """
        known = self._texts.get(token)
        if known is None:
            before = self.decode(self._before, skip_special_tokens=False)
            text = self.decode([*self._before, token], skip_special_tokens=False)[len(before) :]
            raw = _token_bytes(self._backend.id_to_token(token) or "") if REPLACEMENT in text else text.encode()
            known = self._texts[token] = (text, raw)
        return known

    def shows(self, token: int, *, skip_special_tokens: bool) -> bool:
        """Whether a token has any part in the text."""
        return not (skip_special_tokens and token in self._special_ids)

    def may_continue(self, token: int) -> bool:
        """Whether what follows can change how this token reads: it is one byte of a run that counts as a whole."""
        return _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token) or "") is not None


class Detokenizer:
    """Text as it grows, token by token, in pieces that never change afterwards.

    All pieces together are exactly `Tokenizer.decode` of all tokens. Only the tokens since the last complete character
    are decoded again, together with the piece before them: a decoder may treat a first token in its own way.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._given = 0
        """How many of `_ids` made up the piece before."""
        self._given_text = ""

    def push(self, token: int) -> str:
        """Add a token; the text that became certain, possibly none."""
        if not self._tokenizer.shows(token, skip_special_tokens=self._skip):
            return ""
        self._ids.append(token)
        if self._tokenizer.may_continue(token):
            return ""
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._given_text):
            return ""
        piece = text[len(self._given_text) :]
        del self._ids[: self._given]
        self._given = len(self._ids)
        self._given_text = self._decode(self._ids)
        return piece

    def finish(self) -> str:
        """The rest, once no token will follow."""
        return self._decode(self._ids)[len(self._given_text) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _configured_eos_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        except (AttributeError, OSError, RecursionError, ValueError) as error:
            raise TokenizerError(f"{name}: {error}") from error
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(number, int) for number in ids):
                raise TokenizerError(f"{name}: eos_token_id must be a token id or a list of them, got {value!r}")
            return ids
    return []


def _template_parameters() -> set[str]:
    """Parameters of transformers' own call, as opposed to names that reach the template."""
    return set(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) - {"kwargs"}


def _token_bytes(piece: str) -> bytes:
    """The bytes behind a vocabulary entry that is not text by itself: ``<0xE4>``, or byte-level BPE's spelling."""
    byte_token = _BYTE_TOKEN.fullmatch(piece)
    if byte_token:
        return bytes([int(byte_token[1], 16)])
    values = [_BYTE_OF.get(character) for character in piece]
    known = [value for value in values if value is not None]
    return bytes(known) if len(known) == len(values) else piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE (Radford et al. 2019) writes each byte as a printable character: itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
