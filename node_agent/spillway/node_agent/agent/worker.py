"""The engine's thread: load, probe, then lines from the desk until told to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from spillway.api.errors import ErrorCode, LineError
from spillway.api.lines import parse_line
from spillway.api.results import BodyHead
from spillway.node_agent.agent.desk import Desk, LeasedLine, Outcome
from spillway.node_agent.agent.lease_traces import LeaseTraces
from spillway.node_agent.agent.probe import known_answer
from spillway.node_agent.completion import LineTranslator
from spillway.node_agent.lines import LineRunner
from spillway.node_agent.load import LoadedModel

log = logging.getLogger(__name__)

IDLE_S = 0.2


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How to run lines. `keep_kv`: what the device holds is worth writing to disk at the end."""

    load: Callable[[], LoadedModel]
    block_tokens: int
    seed: int
    keep_kv: bool


class Worker:
    """Owns the engine. `on_change` is called from its thread when it became ready or has ended."""

    def __init__(self, config: WorkerConfig, desk: Desk, on_change: Callable[[], None], traces: LeaseTraces) -> None:
        self._config, self._desk, self._on_change, self._traces = config, desk, on_change, traces
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spillway-engine", daemon=True)
        self._lines: dict[tuple[str, int], LeasedLine] = {}
        self.loaded: LoadedModel | None = None
        self.digest = ""
        """Of the probe's answer; empty until it was given."""
        self.idle = threading.Event()
        """Set once no further line will be worked on."""
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Take no further line and leave the others after the step that runs; `idle` says when."""
        self._stopping.set()

    def close(self, timeout_s: float) -> bool:
        """Flush KV and end the thread; whether it did within the time."""
        self._closing.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.loaded = self._config.load()
            limits = self.loaded.limits
            self.digest = known_answer(self.loaded.engine, limits.vocab, self._config.block_tokens)
            translator = LineTranslator(self.loaded.engine.tokenizer, limits, self._config.seed)
            self._on_change()
            self._work(LineRunner(self.loaded.engine, translator))
        except BaseException as error:  # noqa: BLE001 — kept, told, and the process ends with it
            self.error = error
            self._blame(error)
        finally:
            self.idle.set()
            self._on_change()
        self._closing.wait()
        if self.loaded is not None:
            self.loaded.engine.close(keep=self._config.keep_kv and self.error is None)

    def _work(self, runner: LineRunner[tuple[str, int]]) -> None:
        while not self._stopping.is_set():
            for key in self._desk.unwanted():
                runner.cancel(key)
                self._lines.pop(key, None)
            for line in self._desk.take(self._desk.max_lines, 0.0 if runner.num_lines else IDLE_S):
                self._open(runner, line)
            began_s = time.time()
            ended = runner.step()
            self._traces.stepped(began_s, runner.phase, ended)
            for key, result in ended:
                retryable = isinstance(result, LineError) and result.code is ErrorCode.INTERNAL
                self._desk.finish(Outcome(self._lines.pop(key), result, retryable))
        for key in runner.keys:
            runner.cancel(key)

    def _open(self, runner: LineRunner[tuple[str, int]], line: LeasedLine) -> None:
        parsed = parse_line(line.raw, line.line_number)
        if not isinstance(parsed, LineError):
            head = BodyHead(line.response_id, line.created, parsed.body.model)
            self._lines[line.key] = line
            refused = runner.add(line.key, parsed, head)
            if refused is None:
                return
            del self._lines[line.key]
            parsed = refused
        self._traces.refused(line.key)
        self._desk.finish(Outcome(line, parsed))

    def _blame(self, error: BaseException) -> None:
        """A line that breaks the engine must use up its attempts, or it would go from agent to agent for ever."""
        if self.loaded is not None:  # else the process ends with the reason in a sentence
            log.error("the engine stopped", exc_info=error)
        for line in self._lines.values():
            message = f"the engine stopped: {type(error).__name__}"
            self._desk.finish(Outcome(line, LineError(ErrorCode.INTERNAL, message, line.line_number), retryable=True))
