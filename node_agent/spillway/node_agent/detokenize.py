"""Watching for stop strings in text as it grows."""

from __future__ import annotations

from spillway.node_agent.tokenizer import Detokenizer, Tokenizer


class TextTail:
    """The text of one sequence, searched for its stop strings as each piece arrives."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], skip_special_tokens: bool) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = stops
        self._overlap = max(len(stop) for stop in stops) - 1
        self._text = ""

    def push(self, token: int) -> str | None:
        """Add a token. Once a stop string has appeared: the text before the earliest one; until then None."""
        piece = self._detokenizer.push(token)
        if not piece:
            return None
        start = max(0, len(self._text) - self._overlap)
        self._text += piece
        found = [place for stop in self._stops if (place := self._text.find(stop, start)) >= 0]
        return self._text[: min(found)] if found else None
