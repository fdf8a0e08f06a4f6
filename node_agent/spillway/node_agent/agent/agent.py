"""An agent from start to end: engine thread, session with the gateway, health pages, and an orderly way out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from spillway.api.client.target import Target
from spillway.api.errors import SpillwayError
from spillway.api.tracing import Traces
from spillway.api.worker.v1.worker_pb2 import AgentStatus
from spillway.node_agent.agent.desk import Desk
from spillway.node_agent.agent.health import HealthServer
from spillway.node_agent.agent.lease_traces import LeaseTraces
from spillway.node_agent.agent.metrics import AgentCollector
from spillway.node_agent.agent.session import Session
from spillway.node_agent.agent.status import agent_status
from spillway.node_agent.agent.wire import Wire
from spillway.node_agent.agent.worker import Worker, WorkerConfig

log = logging.getLogger(__name__)

EXIT_LATE = 3
"""The grace time was over before everything was put away. Nothing is lost: leases run out."""


class EngineStoppedError(SpillwayError):
    """The engine cannot go on."""


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """`model` is the name that jobs ask for. `health` is "host:port", or None for no pages."""

    target: Target
    model: str
    worker: WorkerConfig
    max_lines: int
    grace_s: float
    health: str | None = None
    name: str = ""
    traces: Traces = field(default_factory=Traces)


def agent_name() -> str:
    """Unique among live agents, and tells people where it runs."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


def run_agent(config: AgentConfig) -> None:
    """Serve until SIGTERM or SIGINT, then hand back what is unfinished and put KV away, within the grace time.

    Raises:
        TargetError: token or TLS files cannot be read.
        HealthAddressError: the address cannot be listened on.
        ProbeError, ModelError, TierError, …: the engine did not come up.
        EngineStoppedError: it broke later.
    """
    asyncio.run(Agent(config).run())


class Agent:
    """One process's agent. Its readiness: probe answered, gateway reached, not stopping."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()
        self._changed = asyncio.Event()
        self._desk = Desk(config.max_lines, self._outcome)
        self._traces = LeaseTraces(config.traces)
        self._worker = Worker(config.worker, self._desk, self._worker_changed, self._traces)
        self._session: Session | None = None
        self._wire: Wire | None = None

    def sick(self) -> str:
        """For /healthz."""
        return f"the engine stopped: {type(self._worker.error).__name__}" if self._worker.error else ""

    def unready(self) -> str:
        """For /readyz."""
        if self._stopped.is_set():
            return "stopping"
        if self._worker.error is not None:
            return self.sick()
        if not self._worker.digest:
            return "the model is loading"
        return self._wire.trouble if self._wire is not None else "starting"

    async def run(self) -> None:
        """As run_agent."""
        config = self._config
        self._loop = asyncio.get_running_loop()
        wire = self._wire = Wire(config.target, config.name or agent_name(), config.model, self._status)
        self._session = Session(wire, self._desk, self._traces)
        registry = CollectorRegistry()
        registry.register(AgentCollector(self._desk, wire, self._worker))
        pages = HealthServer(config.health, self, registry) if config.health is not None else None
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        try:
            if pages is not None:
                log.info("health and metrics on port %d", pages.port)
            self._worker.start()
            if await self._until_ready():
                await self._serve(self._session)
            await self._wind_up(self._session)
        finally:
            await wire.close()
            if pages is not None:
                pages.close()
        error = self._worker.error
        if isinstance(error, SpillwayError):
            raise error
        if error is not None:
            raise EngineStoppedError(f"the engine stopped: {error!r}", "The log says where.") from error

    async def _until_ready(self) -> bool:
        while not self._worker.digest:
            if self._stopped.is_set() or self._worker.error is not None:
                return False
            self._changed.clear()
            await self._changed.wait()
        log.info("ready for lines of model %r; the probe's answer is %s", self._config.model, self._worker.digest[:16])
        return True

    async def _serve(self, session: Session) -> None:
        serving = asyncio.create_task(session.run(), name="spillway-session")
        while not (self._stopped.is_set() or self._worker.idle.is_set() or serving.done()):
            self._changed.clear()
            waits = [asyncio.create_task(self._changed.wait()), serving]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            waits[0].cancel()
        if serving.done():
            serving.result()  # a defect: let it be seen
        self._worker.stop()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    async def _wind_up(self, session: Session) -> None:
        """Lines first, for others wait for them; KV after that. A thread sees to it that this ends in time."""
        deadline_s = time.monotonic() + self._config.grace_s
        guard = threading.Timer(self._config.grace_s, _leave_late)
        guard.daemon = True
        guard.start()
        self._worker.stop()
        if self._worker.loaded is None and self._worker.error is None:  # still loading: nothing to put away
            guard.cancel()
            return
        await asyncio.to_thread(self._worker.idle.wait)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(session.hand_back(), max(0.0, (deadline_s - time.monotonic()) / 2))
        left_s = max(0.0, deadline_s - time.monotonic())
        await asyncio.to_thread(self._worker.close, left_s)
        guard.cancel()
        log.info("stopped")

    def _status(self) -> AgentStatus | None:
        loaded = self._worker.loaded
        return None if loaded is None else agent_status(loaded.engine.stats())

    def _stop(self) -> None:
        if self._stopped.is_set():
            _leave_late()
        log.info("stopping after this step; unfinished lines go back to the gateway")
        self._stopped.set()
        self._changed.set()

    def _outcome(self) -> None:
        if self._session is not None:
            self._from_engine(self._session.wake)

    def _worker_changed(self) -> None:
        self._from_engine(self._changed.set)

    def _from_engine(self, call: Callable[[], object]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is on its way out
                self._loop.call_soon_threadsafe(call)


def _leave_late() -> None:
    log.warning("leaving at once; leases of unfinished lines run out by themselves")
    logging.shutdown()
    os._exit(EXIT_LATE)
