"""What the engine is asked to do: one prompt with its sampling parameters, and the sequences that answer it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from spillway.kvstore import BlockHash


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen for one request; the defaults are the OpenAI ones.

    ``seed`` is never None here: a request without one gets a seed derived from the job's, so that every run of a job
    gives the same output.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    skip_special_tokens: bool = True

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether logits depend on anything but the model: such rows leave the fast path."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete ``params.n`` times. ``order`` is its place in the job: lower is needed sooner."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    order: int


class Finish(Enum):
    """Why a sequence ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability and its most likely rivals, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request as it grows. The scheduler owns ``blocks`` and ``computed``, the engine the tokens."""

    request: Request
    choice: int
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    """Chained hashes of the full blocks of ``tokens``, as far as they were needed."""
    computed: int = 0
    """Tokens whose KV is in ``blocks``."""
    line: int = 0
    """Its number in the job plan that the store follows."""
    expected: list[BlockHash] = field(default_factory=list)
    """What the store was told to expect when the sequence was preempted."""
    started: bool = False
    """Whether the sequence was ever admitted; a later admission is a resumption."""
    waits_for: BlockHash | None = None
    """The block that another sequence was computing when this one was last considered."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    stop_token: int | None = None
    """The end-of-sequence or stop token that ended the sequence; it is not part of the text."""
    text: str | None = None
    """Set when a stop string ended the sequence: the text before it."""

    @property
    def order(self) -> tuple[int, int]:
        """Where the sequence stands in the job: sequences with a higher order are preempted first."""
        return (self.request.order, self.choice)

    @property
    def prompt_length(self) -> int:
        """Length of the prompt in tokens."""
        return len(self.request.prompt)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def remaining_tokens(self) -> int:
        """How many tokens this sequence may still produce."""
        return self.request.params.max_tokens - (len(self.tokens) - self.prompt_length)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request: its sequences in order of choice."""

    request: Request
    sequences: tuple[Sequence, ...]
