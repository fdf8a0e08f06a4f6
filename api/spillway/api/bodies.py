"""Request bodies of `/v1/completions` and `/v1/chat/completions`: strict, typed, frozen.

What a body may hold is the OpenAI reference plus the sampling extensions that open-model servers share (top_k, min_p,
…). Every number is finite and in range, no bool passes for an int, and nothing unknown is let through: a batch that
runs for a night must not silently ignore what somebody asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_STOPS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_INT32 = 2**31 - 1
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`; chat has none and ends with the context."""

TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]


def _text_or_list(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else None


# Unions are told apart by the value's type: errors then speak of the branch that was meant.
Stop = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True), Tag("list")],
    Discriminator(
        _text_or_list, custom_error_type="stop_type", custom_error_message="must be a string or a list of strings"
    ),
]


def _conflict(param: str, message: str) -> PydanticCustomError:
    """An error between fields, blamed on one of them."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "param": param})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def _check_plain_json(value: Any, depth: int = 0) -> None:
    """Raises ValueError for nesting past 32 and for numbers that JSON does not have."""
    if depth > 32:
        raise ValueError("nested more than 32 deep")
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        raise ValueError("holds a number that is not finite")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        _check_plain_json(child, depth + 1)


class SamplingBody(_Strict):
    """What both endpoints share. Defaults are OpenAI's."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT32)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    skip_special_tokens: bool | None = None

    @field_validator("stop")
    @classmethod
    def _stops_are_strings_of_some_length(cls, value: str | list[str] | None) -> str | list[str] | None:
        if any(not text or len(text) > 1024 for text in _as_list(value)):
            raise ValueError("each stop string needs 1 to 1024 characters")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _biases_name_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is None:
            return None
        if len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"at most {MAX_LOGIT_BIAS} tokens can be biased")
        seen: set[int] = set()
        for token, bias in value.items():
            if not (token.isascii() and token.isdigit()) or len(token) > 10 or int(token) > MAX_INT32:
                raise ValueError("keys must be token ids, written as decimal strings")
            if not -100 <= bias <= 100:
                raise ValueError("each bias must lie in [-100, 100]")
            if int(token) in seen:
                raise ValueError("two keys name the same token")
            seen.add(int(token))
        return value

    @model_validator(mode="after")
    def _minimum_below_maximum(self) -> Self:
        limit = self.max_new_tokens
        if self.min_tokens is not None and limit is not None and self.min_tokens > limit:
            raise _conflict("min_tokens", f"{self.min_tokens} is more than the maximum of {limit} tokens")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """How many tokens one choice may have; None: until the context is full."""
        return self.max_tokens

    @property
    def choices_per_prompt(self) -> int:
        """`n`, resolved."""
        return 1 if self.n is None else self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, as a tuple."""
        return tuple(_as_list(self.stop))

    @property
    def logit_biases(self) -> dict[int, float]:
        """`logit_bias` by token id."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report per token (0: only the chosen token's own); None: no log-probabilities."""
        raise NotImplementedError


def _as_list(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, bool):
        return None
    return {str: "texts", int: "tokens", list: "token_lists"}.get(type(first))


Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("token_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, or a non-empty list of strings, of token ids, or of lists of token ids",
    ),
]


class CompletionBody(SamplingBody):
    """Body of `/v1/completions`. `best_of` is only accepted equal to `n`."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices_per_prompt:
            raise _conflict("best_of", "is only supported equal to n")
        return self

    @property
    def max_new_tokens(self) -> int:
        """Tokens per choice; 16 where the line does not say, as OpenAI has it."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """`logprobs`, which here is a count."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, text or token ids. Choice index = prompt number · n + choice number."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(_Strict):
    """The one kind of content part that a text model can read."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("list")],
    Discriminator(
        _text_or_list, custom_error_type="content_type", custom_error_message="must be a string or a list of text parts"
    ),
]


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: Annotated[str, Field(max_length=512)] | None = None
    tool_call_id: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="after")
    def _only_tools_answer_calls(self) -> Self:
        if self.tool_call_id is not None and self.role != "tool":
            raise _conflict("tool_call_id", "belongs to messages of role tool")
        return self

    @property
    def text(self) -> str:
        """Content as one string; text parts are joined by newlines."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatBody(SamplingBody):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_arguments_are_json(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        _check_plain_json(value)
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _conflict("max_tokens", "is the older name of max_completion_tokens, and the two differ")
        if self.top_logprobs and not self.logprobs:
            raise _conflict("top_logprobs", "needs logprobs to be true")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens per choice; None: until the context is full."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """`top_logprobs` where `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_messages(self) -> list[dict[str, str]]:
        """What a chat template gets: role, content, and name or tool_call_id if given.

        `developer` is OpenAI's newer word for `system`; open models were trained on `system`, so that is what they see.
        """
        rows: list[dict[str, str]] = []
        for message in self.messages:
            row = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            row |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
            rows.append(row)
        return rows
