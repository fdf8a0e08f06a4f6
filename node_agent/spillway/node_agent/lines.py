"""Batch lines through the engine: a line is one or several requests, and is done when all of them are."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from spillway.api.errors import ErrorCode, LineError
from spillway.api.lines import BatchLine
from spillway.api.results import BodyHead
from spillway.node_agent.completion import LineTranslator, kv_capacity_message
from spillway.node_agent.engine import Engine, FailureKind, Phase, RequestFailure
from spillway.node_agent.request import Request, RequestOutput

LOOKAHEAD_SEQUENCES = 1024
"""Prompts in the engine at most, however short."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The response body of a line, and what it cost."""

    body: bytes
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class _OpenLine(Generic[Key]):
    """A line in the engine: which of its prompts are done."""

    key: Key
    line: BatchLine
    head: BodyHead
    requests: list[Request]
    outputs: dict[int, RequestOutput] = field(default_factory=dict)


class LineRunner(Generic[Key]):
    """Runs lines, each under a key of the caller's. One thread, the engine's."""

    def __init__(self, engine: Engine, translator: LineTranslator) -> None:
        self._engine = engine
        self._translator = translator
        self._open: dict[Key, _OpenLine[Key]] = {}
        self._by_request: dict[int, _OpenLine[Key]] = {}
        self._tokens = 0

    @property
    def num_lines(self) -> int:
        """Lines that are not done."""
        return len(self._open)

    @property
    def keys(self) -> list[Key]:
        """Of the lines that are not done."""
        return list(self._open)

    @property
    def has_room(self) -> bool:
        """Whether the engine would profit from knowing further lines."""
        return self._tokens < self._engine.window_tokens and self._engine.num_requests < LOOKAHEAD_SEQUENCES

    def add(self, key: Key, line: BatchLine, head: BodyHead) -> LineError | None:
        """Queue a line; or why it cannot run."""
        requests = self._translator.requests(line)
        if isinstance(requests, LineError):
            return requests
        if len(requests) > 1:  # in order of their first prompts, the others are anywhere
            self._engine.lines_scatter()
        opened = self._open[key] = _OpenLine(key, line, head, requests)
        for request in requests:
            self._by_request[request.id] = opened
            self._tokens += len(request.prompt)
            self._engine.add(request)
        return None

    def end(self) -> None:
        """No further line will be added."""
        self._engine.lines_end()

    def step(self) -> list[tuple[Key, LineAnswer | LineError]]:
        """One step of the engine; the lines that ended in it."""
        if not self._open:
            return []
        ended: list[tuple[Key, LineAnswer | LineError]] = []
        for outcome in self._engine.step():
            opened = self._by_request.get(outcome.request.id)
            if opened is None:  # a sibling failed in this very step
                continue
            self._forget(outcome.request)
            if isinstance(outcome, RequestFailure):
                self.cancel(opened.key)
                ended.append((opened.key, self._explain(opened.line, outcome)))
                continue
            opened.outputs[outcome.request.id] = outcome
            if len(opened.outputs) == len(opened.requests):
                del self._open[opened.key]
                ended.append((opened.key, self._answer(opened)))
        return ended

    def phase(self, key: Key) -> Phase:
        """How far a line has come: all of its prompts have a token, or one was begun, or none."""
        opened = self._open.get(key)
        phases = set() if opened is None else {self._engine.phase(request) for request in opened.requests}
        if phases <= {Phase.DECODE}:
            return Phase.DECODE
        return Phase.WAITING if phases == {Phase.WAITING} else Phase.PREFILL

    def cancel(self, key: Key) -> None:
        """Take a line out, wherever it stands, and free what it holds; between steps only. No error if it is done."""
        opened = self._open.pop(key, None)
        for request in [] if opened is None else opened.requests:
            if request.id in self._by_request:
                self._forget(request)
                self._engine.cancel(request)

    def _forget(self, request: Request) -> None:
        del self._by_request[request.id]
        self._tokens -= len(request.prompt)

    def _answer(self, opened: _OpenLine[Key]) -> LineAnswer:
        outputs = [opened.outputs[request.id] for request in opened.requests]
        return LineAnswer(
            self._translator.body(opened.line, opened.head, outputs),
            sum(len(output.request.prompt) for output in outputs),
            sum(len(each.generated) for output in outputs for each in output.sequences),
        )

    def _explain(self, line: BatchLine, failure: RequestFailure) -> LineError:
        if failure.kind is FailureKind.KV_CAPACITY:
            message = kv_capacity_message(self._engine.pool_tokens + 1, self._engine.pool_tokens)
            return LineError(ErrorCode.KV_CAPACITY_EXCEEDED, message, line.line_number, "max_tokens", line.custom_id)
        return LineError(ErrorCode.INTERNAL, failure.kind.value, line.line_number, None, line.custom_id)
