"""The loop of `spillway run`: pending lines in, engine steps, results out. One thread; every wait is a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from spillway.api.errors import LineError
from spillway.api.lines import BatchLine
from spillway.gateway.job import Job, PendingLine
from spillway.node_agent.completion import LineTranslator
from spillway.node_agent.engine import Engine
from spillway.node_agent.lines import LineAnswer, LineRunner


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

    def run(self) -> None:
        """Run the job's pending lines. Returns early, within a step, once ``stop()`` is true."""
        source = iter(self.job.pending())
        runner: LineRunner[int] = LineRunner(self.engine, self.translator)
        exhausted = False
        while not self.stop():
            if not exhausted and not self._feed(source, runner):
                exhausted = True
                runner.end()
            if not runner.num_lines:
                if exhausted:
                    return
                continue
            for index, outcome in runner.step():
                self._take(index, outcome)
            self.tally.model_tokens = self.engine.model_tokens
            self.on_step(self.tally)

    def _feed(self, source: Iterator[PendingLine], runner: LineRunner[int]) -> bool:
        """Top up the engine's queue; False when the job has no further line."""
        while runner.has_room:
            pending = next(source, None)
            if pending is None:
                return False
            line = BatchLine(pending.custom_id, pending.url, pending.body, pending.line_number)
            refused = runner.add(pending.index, line, pending.head)
            if refused is not None:
                self._take(pending.index, refused)
        return True

    def _take(self, index: int, outcome: LineAnswer | LineError) -> None:
        if isinstance(outcome, LineError):
            self.job.fail(index, outcome)
            self.tally.lines_failed += 1
            return
        self.job.complete(index, outcome.body)
        self.tally.lines_done += 1
        self.tally.prompt_tokens += outcome.prompt_tokens
        self.tally.completion_tokens += outcome.completion_tokens
