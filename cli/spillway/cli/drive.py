"""The loop of `spillway run`: pending lines in, engine steps, results out. One thread; every wait is a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from spillway.api.errors import ErrorCode, LineError
from spillway.api.lines import BatchLine
from spillway.api.results import BodyHead
from spillway.gateway.job import Job, PendingLine
from spillway.node_agent.completion import LineTranslator, kv_capacity_message
from spillway.node_agent.engine import Engine, FailureKind, RequestFailure
from spillway.node_agent.request import RequestOutput

LOOKAHEAD_TOKENS = 1 << 17
"""Prompts tokenized ahead of the engine: enough to see which share a prefix, a few MiB of memory."""
LOOKAHEAD_SEQUENCES = 1024


@dataclass(slots=True)
class _OpenLine:
    """A line in the engine: which of its prompts are done."""

    index: int
    line: BatchLine
    head: BodyHead
    outputs: list[RequestOutput | None]
    failed: bool = False


@dataclass(slots=True)
class Tally:
    """What this run did, for the progress display and the report."""

    lines_done: int = 0
    lines_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model_tokens: int = 0
    """Tokens the model ran over, of lines that are still under way too: what moves between two finished lines."""


@dataclass(slots=True)
class Driver:
    """Feeds an engine from a job until there is nothing left or ``stop`` says so."""

    job: Job
    engine: Engine
    translator: LineTranslator
    stop: Callable[[], bool]
    on_step: Callable[[Tally], None]
    tally: Tally = field(default_factory=Tally)
    _lines: dict[int, tuple[_OpenLine, int]] = field(default_factory=dict)
    _waiting_tokens: int = 0

    def run(self) -> None:
        """Run the job's pending lines. Returns early, within a step, once ``stop()`` is true."""
        source = iter(self.job.pending())
        exhausted = False
        while not self.stop():
            exhausted = exhausted or not self._feed(source)
            if not self.engine.num_requests:
                if exhausted:
                    return
                continue
            for outcome in self.engine.step():
                self._take(outcome)
            self.tally.model_tokens = self.engine.model_tokens
            self.on_step(self.tally)

    def _feed(self, source: Iterator[PendingLine]) -> bool:
        """Top up the engine's queue; False when the job has no further line."""
        while self._waiting_tokens < LOOKAHEAD_TOKENS and self.engine.num_requests < LOOKAHEAD_SEQUENCES:
            pending = next(source, None)
            if pending is None:
                return False
            self._open(pending)
        return True

    def _open(self, pending: PendingLine) -> None:
        line = BatchLine(pending.custom_id, pending.url, pending.body, pending.line_number)
        requests = self.translator.requests(line)
        if isinstance(requests, LineError):
            self._fail(pending.index, requests)
            return
        opened = _OpenLine(pending.index, line, pending.head, [None] * len(requests))
        for number, request in enumerate(requests):
            self._lines[request.id] = (opened, number)
            self._waiting_tokens += len(request.prompt)
            self.engine.add(request)

    def _take(self, outcome: RequestOutput | RequestFailure) -> None:
        line, number = self._lines.pop(outcome.request.id)
        self._waiting_tokens -= len(outcome.request.prompt)
        if line.failed:
            return
        if isinstance(outcome, RequestFailure):
            line.failed = True
            self._fail(line.index, self._explain(line.line, outcome))
            return
        line.outputs[number] = outcome
        done = [each for each in line.outputs if each is not None]
        if len(done) == len(line.outputs):
            self._complete(line, done)

    def _complete(self, line: _OpenLine, outputs: list[RequestOutput]) -> None:
        self.job.complete(line.index, self.translator.body(line.line, line.head, outputs))
        self.tally.lines_done += 1
        self.tally.prompt_tokens += sum(len(output.request.prompt) for output in outputs)
        self.tally.completion_tokens += sum(len(each.generated) for output in outputs for each in output.sequences)

    def _fail(self, index: int, error: LineError) -> None:
        self.job.fail(index, error)
        self.tally.lines_failed += 1

    def _explain(self, line: BatchLine, failure: RequestFailure) -> LineError:
        if failure.kind is FailureKind.KV_CAPACITY:
            message = kv_capacity_message(self.engine.pool_tokens + 1, self.engine.pool_tokens)
            return LineError(ErrorCode.KV_CAPACITY_EXCEEDED, message, line.line_number, "max_tokens", line.custom_id)
        return LineError(ErrorCode.INTERNAL, failure.kind.value, line.line_number, None, line.custom_id)
