"""Result lines and response bodies, in the shape and key order of OpenAI's batch output files.

JSON is compact and UTF-8: characters outside ASCII are written as themselves, not as escapes. Nothing here differs
between two runs of the same job except `created`; so there is no `cached_tokens`, no timing and no host name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import isnan
from typing import Any, Literal

import msgspec

from spillway.api.errors import LineError
from spillway.api.lines import CHAT_URL, Url

FinishReason = Literal["stop", "length"]
LOWEST_LOGPROB = -9999.0
"""What the API writes for a token that could not have been sampled: JSON has no minus infinity."""


@dataclass(frozen=True, slots=True)
class TokenAlternative:
    """A token and its natural-log probability. `token_bytes` is exact where `text` had to replace half a character."""

    text: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The sampled token and the likeliest tokens at its position, best first."""

    chosen: TokenAlternative
    top: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated text. `logprobs` has one entry per token of `text`, or is None if they were not asked for."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a line: prompts counted once however many choices share them, generated tokens of all choices."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, int]:
        """The API's object, total included."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def usage_of(body: bytes) -> Usage:
    """What the `usage` of a response body says; zeros where it says nothing that can be used.

    Raises msgspec.DecodeError for what is no JSON object.
    """
    stated = _BODY_DECODER.decode(body).usage
    if not isinstance(stated, dict):
        return Usage(0, 0)
    return Usage(_count(stated.get("prompt_tokens")), _count(stated.get("completion_tokens")))


def _count(stated: object) -> int:
    return stated if type(stated) is int and 0 <= stated < 2**53 else 0


class _Used(msgspec.Struct):
    usage: Any = None


_BODY_DECODER = msgspec.json.Decoder(_Used)


@dataclass(frozen=True, slots=True)
class LineIds:
    """The three ids of a line. They follow from the job and the line, so a rerun writes the same ones."""

    batch: str
    request: str
    body: str


@dataclass(frozen=True, slots=True)
class BodyHead:
    """What opens a response body: its id (LineIds.body), `created` in Unix seconds, and the request's model name."""

    id: str
    created: int
    model: str


def line_ids(job_digest: bytes, index: int, custom_id: str, url: Url) -> LineIds:
    """Ids of line `index` (counted from 0 over the request lines) of the job with that digest."""
    digest = _line_digest(job_digest, index, custom_id)
    prefix = "chatcmpl" if url == CHAT_URL else "cmpl"
    return LineIds(batch=f"batch_req_{digest}", request=f"req_{digest}", body=f"{prefix}-{digest}")


def batch_request_id(job_digest: bytes, index: int, custom_id: str | None) -> str:
    """LineIds.batch alone, for a line that has no url or no custom_id to speak of."""
    return f"batch_req_{_line_digest(job_digest, index, custom_id)}"


def _line_digest(job_digest: bytes, index: int, custom_id: str | None) -> str:
    name = ("" if custom_id is None else custom_id).encode("utf-8")
    return blake2b(index.to_bytes(8, "little") + name, key=job_digest[:64], digest_size=16).hexdigest()


def completion_body(head: BodyHead, choices: Sequence[Choice], usage: Usage) -> bytes:
    """Body of a `/v1/completions` response. Raises ValueError for a log-probability that is NaN."""
    rows = [
        {
            "text": choice.text,
            "index": choice.index,
            "logprobs": None if choice.logprobs is None else _completion_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    return _encode(_body("text_completion", head, rows, usage))


def chat_body(head: BodyHead, choices: Sequence[Choice], usage: Usage) -> bytes:
    """Body of a `/v1/chat/completions` response. Raises ValueError for a log-probability that is NaN."""
    rows = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None if choice.logprobs is None else _chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    return _encode(_body("chat.completion", head, rows, usage))


def result_line(ids: LineIds, custom_id: str, body: bytes) -> bytes:
    """A line of the output file, newline included. `body` is JSON and is placed as it is."""
    return (b'{"id":"%b","custom_id":%b,"response":{"status_code":200,"request_id":"%b","body":%b},"error":null}\n') % (
        ids.batch.encode(),
        _encode(custom_id),
        ids.request.encode(),
        body,
    )


def body_of_result(row: bytes) -> bytes:
    """The body in what `result_line` made. Raises msgspec.DecodeError for anything else."""
    return bytes(_ROW_DECODER.decode(row).response.body)


class _Response(msgspec.Struct):
    body: msgspec.Raw


class _ResultRow(msgspec.Struct):
    response: _Response


_ROW_DECODER = msgspec.json.Decoder(_ResultRow)


def error_line(batch_id: str, error: LineError) -> bytes:
    """A line of the error file, newline included: no response, and an error as in OpenAI's lists of batch errors."""
    details = {"code": str(error.code), "message": error.message, "param": error.param, "line": error.line}
    return _encode({"id": batch_id, "custom_id": error.custom_id, "response": None, "error": details}) + b"\n"


def _body(kind: str, head: BodyHead, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage.as_json(),
        "system_fingerprint": None,
    }


def _completion_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    offsets, position = [], 0
    for token in tokens:
        offsets.append(position)
        position += len(token.chosen.text)
    return {
        "tokens": [token.chosen.text for token in tokens],
        "token_logprobs": [_finite(token.chosen.logprob) for token in tokens],
        "top_logprobs": [_best_by_text(token.top) for token in tokens],
        "text_offset": offsets,
    }


def _best_by_text(alternatives: Sequence[TokenAlternative]) -> dict[str, float] | None:
    """Two tokens may read the same (halves of characters do): the likelier one keeps the key."""
    best: dict[str, float] = {}
    for other in alternatives:
        best.setdefault(other.text, _finite(other.logprob))
    return best or None


def _chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    content = [
        {**_alternative(token.chosen), "top_logprobs": [_alternative(other) for other in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def _alternative(token: TokenAlternative) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.token_bytes)}


def _finite(logprob: float) -> float:
    if isnan(logprob):
        raise ValueError("a log-probability is NaN")
    return max(logprob, LOWEST_LOGPROB)


def _encode(value: Any) -> bytes:
    return msgspec.json.encode(value)
