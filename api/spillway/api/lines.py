"""One line of an OpenAI Batch file: bytes in, a checked `BatchLine` or a `LineError` out. Never raises on input.

Strictness is on purpose. JSON that parsers disagree about (repeated keys, NaN, lone surrogates) is refused, because a
line that two programs read differently is a line that nobody can check.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from pydantic import ValidationError

from spillway.api import unsupported
from spillway.api.bodies import ChatBody, CompletionBody, Message
from spillway.api.errors import ErrorCode, LineError

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_CUSTOM_ID_CHARS = 512
MAX_OBJECT_KEYS = 4096
"""More keys in one object than any request has; keeps an attack from becoming a million error records."""

COMPLETIONS_URL: Literal["/v1/completions"] = "/v1/completions"
CHAT_URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"
Url = Literal["/v1/completions", "/v1/chat/completions"]
Body = CompletionBody | ChatBody

_ENVELOPE = ("custom_id", "method", "url", "body")
_ENVELOPE_SET = frozenset(_ENVELOPE)
_CHAT_FIELDS = frozenset(ChatBody.model_fields)
_COMPLETION_FIELDS = frozenset(CompletionBody.model_fields)
_MESSAGE_FIELDS = frozenset(Message.model_fields)
_BRANCHES = frozenset(("text", "list", "texts", "tokens", "token_lists"))
"""Tags of the unions in bodies.py, which pydantic puts into the path of a field."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line that may run. `body` is a ChatBody exactly if `url` is the chat endpoint."""

    custom_id: str
    url: Url
    body: Body
    line_number: int


class _Refused(Exception):  # noqa: N818 — internal control flow, always turned into a LineError
    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def line_too_long(line_number: int, limit_bytes: int) -> LineError:
    """The error of a line over the limit; its bytes need not be at hand."""
    return LineError(ErrorCode.LINE_TOO_LONG, f"the line is longer than {limit_bytes} bytes", line_number)


def parse_line(raw: bytes, line_number: int, max_bytes: int = MAX_LINE_BYTES) -> BatchLine | LineError:
    """Reads one line, without its newline.

    Any bytes are allowed; whatever is wrong comes back as a LineError that carries the line's custom_id if it has a
    usable one. Memory is bounded by a small multiple of the line.
    """
    if len(raw) > max_bytes:
        return line_too_long(line_number, max_bytes)
    custom_id: str | None = None
    try:
        fields = _parse_json(raw)
        custom_id = usable_custom_id(fields)
        url = _check_envelope(fields)
        return BatchLine(cast(str, custom_id), url, _parse_body(url, fields["body"]), line_number)
    except _Refused as refused:
        return LineError(refused.code, refused.message, line_number, refused.param, custom_id)


class KnownLine(msgspec.Struct, frozen=True):
    """What names a line that passed `parse_line` before."""

    custom_id: str
    url: Url
    body: KnownBody


class KnownBody(msgspec.Struct, frozen=True):
    """The model that the request names."""

    model: str


def read_known_line(raw: bytes) -> KnownLine:
    """Reads the little that names a line, a tenth of the work of `parse_line`, and checks nothing else.

    Raises msgspec.DecodeError for what is no such line.
    """
    return _KNOWN_DECODER.decode(raw)


_KNOWN_DECODER = msgspec.json.Decoder(KnownLine)


def usable_custom_id(fields: dict[str, Any]) -> str | None:
    """The custom_id if it is a string of 1 to 512 characters, else None."""
    value = fields.get("custom_id")
    return value if isinstance(value, str) and 0 < len(value) <= MAX_CUSTOM_ID_CHARS else None


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # only escapes can smuggle a lone surrogate into decoded UTF-8
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refused(ErrorCode.INVALID_JSON, f"not UTF-8: byte {error.start} of the line") from None
    except UnicodeEncodeError:
        raise _Refused(ErrorCode.INVALID_JSON, "a \\u escape stands for half a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise _Refused(ErrorCode.INVALID_JSON, f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise _Refused(ErrorCode.INVALID_JSON, "nested too deep") from None
    except ValueError:  # Python refuses to build integers of more than 4300 digits
        raise _Refused(ErrorCode.INVALID_PARAMETER, "holds an integer of thousands of digits") from None
    if not isinstance(value, dict):
        raise _Refused(ErrorCode.INVALID_JSON, "not a JSON object")
    return value


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_OBJECT_KEYS:
        raise _Refused(ErrorCode.INVALID_JSON, f"an object has more than {MAX_OBJECT_KEYS} keys")
    fields = dict(pairs)
    if len(fields) != len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise _Refused(ErrorCode.INVALID_JSON, f"the key {_quoted(repeated)} stands twice in one object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_repeats)


def _check_envelope(fields: dict[str, Any]) -> Url:
    if fields.keys() != _ENVELOPE_SET:
        for name in fields:
            if name not in _ENVELOPE_SET:
                message = f"unknown field {_quoted(name)} beside the body"
                raise _Refused(ErrorCode.UNKNOWN_PARAMETER, message, _clip(name))
        missing = next(name for name in _ENVELOPE if name not in fields)
        raise _Refused(ErrorCode.MISSING_PARAMETER, f"{missing} is missing", missing)
    if usable_custom_id(fields) is None:
        message = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        raise _Refused(ErrorCode.INVALID_REQUEST, message, "custom_id")
    if fields["method"] != "POST":
        raise _Refused(ErrorCode.INVALID_REQUEST, 'method must be "POST"', "method")
    if fields["url"] not in (COMPLETIONS_URL, CHAT_URL):
        raise _Refused(ErrorCode.INVALID_REQUEST, f'url must be "{COMPLETIONS_URL}" or "{CHAT_URL}"', "url")
    if not isinstance(fields["body"], dict):
        raise _Refused(ErrorCode.INVALID_REQUEST, "body must be an object", "body")
    return cast(Url, fields["url"])


def _parse_body(url: Url, fields: dict[str, Any]) -> Body:
    model = ChatBody if url == CHAT_URL else CompletionBody
    table = unsupported.CHAT if url == CHAT_URL else unsupported.COMPLETION
    known = _CHAT_FIELDS if url == CHAT_URL else _COMPLETION_FIELDS
    if not fields.keys() <= known:
        fields = _without_harmless(fields, table)
        for name in fields:
            if name not in known:
                raise _Refused(ErrorCode.UNKNOWN_PARAMETER, f"unknown parameter {_quoted(name)}", _clip(name))
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [_supported_message(row, index) for index, row in enumerate(messages)]
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _from_pydantic(error) from None


def _without_harmless(fields: dict[str, Any], table: Mapping[str, tuple[Any, ...]], path: str = "") -> dict[str, Any]:
    """The fields less those that ask for nothing; refuses those that ask for something unsupported."""
    name = unsupported.unsupported_field(fields, table)
    if name is not None:
        message = f"{path}{name} is not supported, or not with this value"
        raise _Refused(ErrorCode.UNSUPPORTED_PARAMETER, message, path + name)
    return {name: value for name, value in fields.items() if name not in table}


def _supported_message(row: Any, index: int) -> Any:
    """The message less fields that ask for nothing; what is no message at all is left for the model to refuse."""
    if not isinstance(row, dict):
        return row
    if not row.keys() <= _MESSAGE_FIELDS:
        row = _without_harmless(row, unsupported.MESSAGE, f"messages[{index}].")
    content = row.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in unsupported.CONTENT_TYPES:
            param = f"messages[{index}].content[{number}].type"
            raise _Refused(ErrorCode.UNSUPPORTED_PARAMETER, f"content of type {kind} is not supported", param)
    return row


def _from_pydantic(error: ValidationError) -> _Refused:
    details = error.errors(include_url=False, include_input=False)
    first = details[0]
    blamed = (first["ctx"]["param"],) if first["type"] == "conflict" else ()
    param = _path(first["loc"] + blamed)
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return _Refused(ErrorCode.MISSING_PARAMETER, f"{param} is missing", param)
    if kind == "extra_forbidden":
        return _Refused(ErrorCode.UNKNOWN_PARAMETER, f"unknown parameter {param}", param)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _Refused(ErrorCode.INVALID_PARAMETER, f"{param}: {message}{more}" if param else message + more, param)


def _path(location: tuple[int | str, ...]) -> str | None:
    """`messages[0].content` from pydantic's location, less the names of union branches."""
    path = ""
    for position, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif position == 0:
            path = step
        elif step not in _BRANCHES or (position == len(location) - 1 and isinstance(location[-2], int)):
            path += f".{step}"
    return _clip(path) or None


def _clip(name: str) -> str:
    return name if len(name) <= 100 else name[:99] + "…"


def _quoted(name: str) -> str:
    return json.dumps(_clip(name))
