"""Between batch lines and the engine: a line's body becomes requests, finished requests become the response body."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count

from spillway.api.bodies import ChatBody, CompletionBody
from spillway.api.errors import ErrorCode, LineError
from spillway.api.lines import BatchLine
from spillway.api.results import (
    BodyHead,
    Choice,
    FinishReason,
    TokenAlternative,
    TokenLogprobs,
    Usage,
    chat_body,
    completion_body,
)
from spillway.node_agent.models.errors import ChatTemplateError
from spillway.node_agent.request import Request, RequestOutput, SamplingParams, Sequence, TokenLogprob
from spillway.node_agent.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Limits:
    """What a line must keep to. ``context_tokens``: the model's; ``pool_tokens``: what the device pool holds."""

    context_tokens: int
    pool_tokens: int
    vocab: int


class LineTranslator:
    """Turns lines into requests and back. Ids and orders of requests count up in the order of the calls."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits, seed: int) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._seed = seed
        self._ids: Iterator[int] = count()

    def requests(self, line: BatchLine) -> list[Request] | LineError:
        """One request for each prompt of the line, or why the line cannot run. Prompt number j gives choices j·n …"""
        body = line.body
        try:
            prompts = self._prompts(body)
        except ChatTemplateError as error:
            return LineError(ErrorCode.CHAT_TEMPLATE_FAILED, str(error), line.line_number, "messages", line.custom_id)
        checked = [self._check(body, prompt) for prompt in prompts]
        for failure in checked:
            if isinstance(failure, _Refusal):
                return LineError(failure.code, failure.message, line.line_number, failure.param, line.custom_id)
        requests = []
        for number, prompt in enumerate(prompts):
            request_id = next(self._ids)
            params = self._params(body, len(prompt), self._seed_of(line, number))
            requests.append(Request(request_id, tuple(prompt), params, order=request_id))
        return requests

    def _prompts(self, body: CompletionBody | ChatBody) -> list[list[int]]:
        if isinstance(body, ChatBody):
            return [self._tokenizer.encode_chat(body.template_messages, body.chat_template_kwargs or {})]
        return [self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]

    def _check(self, body: CompletionBody | ChatBody, prompt: list[int]) -> _Refusal | None:
        limits, wanted = self._limits, body.max_new_tokens
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        if not prompt:
            return _Refusal(ErrorCode.INVALID_PARAMETER, "the prompt has no tokens", param)
        if max(prompt) >= limits.vocab:
            return _Refusal(
                ErrorCode.INVALID_PARAMETER,
                f"token id {max(prompt)} is outside the vocabulary of {limits.vocab}",
                param,
            )
        outside = [token for token in body.logit_biases if token >= limits.vocab]
        if outside:
            return _Refusal(
                ErrorCode.INVALID_PARAMETER,
                f"token id {outside[0]} is outside the vocabulary of {limits.vocab}",
                "logit_bias",
            )
        total = len(prompt) + (1 if wanted is None else wanted)
        if total > limits.context_tokens:
            asked = "" if wanted is None else f" and {wanted} to generate"
            message = f"the model's context is {limits.context_tokens} tokens; the prompt has {len(prompt)}{asked}"
            return _Refusal(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param if wanted is None else "max_tokens")
        if len(prompt) > limits.pool_tokens:
            return _Refusal(ErrorCode.KV_CAPACITY_EXCEEDED, kv_capacity_message(len(prompt), limits.pool_tokens), param)
        return None

    def _params(self, body: CompletionBody | ChatBody, prompt_tokens: int, seed: int) -> SamplingParams:
        wanted = body.max_new_tokens
        return SamplingParams(
            max_tokens=self._limits.context_tokens - prompt_tokens if wanted is None else wanted,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(body.top_k or 0, 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            n=body.choices_per_prompt,
            seed=seed,
            stop=body.stop_strings,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            min_tokens=body.min_tokens or 0,
            ignore_eos=bool(body.ignore_eos),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            logit_bias=tuple(sorted(body.logit_biases.items())),
            logprobs=body.num_logprobs,
            skip_special_tokens=body.skip_special_tokens is not False,
        )

    def _seed_of(self, line: BatchLine, number: int) -> int:
        """The line's seed for its first prompt; else one that follows from the job's seed and the line's name."""
        own = line.body.seed
        if own is not None and number == 0:
            return own
        origin = f"{self._seed} {line.custom_id}" if own is None else f"{own}"
        return int.from_bytes(blake2b(f"{number} {origin}".encode(), digest_size=8).digest(), "little")

    def body(self, line: BatchLine, head: BodyHead, outputs: list[RequestOutput]) -> bytes:
        """The response body of a line whose requests are all done, in the order of its prompts."""
        choices = [
            self._choice(number * line.body.choices_per_prompt + sequence.choice, sequence)
            for number, output in enumerate(outputs)
            for sequence in output.sequences
        ]
        usage = Usage(
            prompt_tokens=sum(len(output.request.prompt) for output in outputs),
            completion_tokens=sum(len(sequence.generated) for output in outputs for sequence in output.sequences),
        )
        build = chat_body if isinstance(line.body, ChatBody) else completion_body
        return build(head, choices, usage)

    def _choice(self, index: int, sequence: Sequence) -> Choice:
        shown = sequence.generated[:-1] if sequence.stop_token is not None else sequence.generated
        params = sequence.request.params
        text = sequence.text
        if text is None:
            text = self._tokenizer.decode(shown, skip_special_tokens=params.skip_special_tokens)
        logprobs = None
        if params.logprobs is not None:
            logprobs = tuple(self._logprobs(each) for each in sequence.logprobs[: len(shown)])
        reason: FinishReason = "stop" if sequence.finish is not None and sequence.finish.value == "stop" else "length"
        return Choice(index, text, reason, logprobs)

    def _logprobs(self, entry: TokenLogprob) -> TokenLogprobs:
        top = tuple(self._alternative(token, logprob) for token, logprob in entry.top)
        return TokenLogprobs(self._alternative(entry.token, entry.logprob), top)

    def _alternative(self, token: int, logprob: float) -> TokenAlternative:
        text, raw = self._tokenizer.token_text(token)
        return TokenAlternative(text, raw, logprob)


@dataclass(frozen=True, slots=True)
class _Refusal:
    code: ErrorCode
    message: str
    param: str


def kv_capacity_message(tokens: int, pool_tokens: int) -> str:
    """What to tell a user whose sequence can never fit the device pool."""
    return (
        f"the sequence has {tokens} tokens and the device pool holds {pool_tokens}; "
        "raise --device-kv or ask for fewer tokens"
    )
