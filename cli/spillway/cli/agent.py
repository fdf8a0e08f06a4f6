"""`spillway agent`: this machine's engine in the service of a gateway."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from spillway.api.client.target import Target
from spillway.api.otlp import tracing
from spillway.cli.engine_options import chosen_dtype, describe_tiers, engine_config
from spillway.cli.options import EngineOptions
from spillway.node_agent.agent.agent import AgentConfig, run_agent
from spillway.node_agent.agent.worker import WorkerConfig
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.load import LoadedModel, load_engine, pick_device
from spillway.node_agent.sharing import SharingConfig

log = logging.getLogger(__name__)

CPU_LINES = 32
"""Lines that an agent without a GPU holds: enough to fill its steps, few enough to leave some to other agents."""


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What the user asked for. `served_model` is the name that jobs ask for."""

    engine: EngineOptions
    sharing: SharingConfig | None
    target: Target
    served_model: str
    name: str
    max_lines: int | None
    health_listen: str | None
    grace_s: float


def agent(options: AgentOptions) -> None:
    """Serve until SIGTERM or SIGINT. Raises SpillwayError for what keeps it from serving."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    device = pick_device(options.engine.device).type
    with tempfile.TemporaryDirectory(prefix="spillway-kv-") as folder, tracing("spillway-agent") as traces:
        worker = WorkerConfig(
            load=lambda: _load(options, Path(folder)),
            block_tokens=options.engine.block_tokens,
            seed=options.engine.seed,
            keep_kv=options.engine.disk_dir is not None,
        )
        max_lines = options.max_lines or (CPU_LINES if device == "cpu" else 2 * options.engine.max_sequences)
        run_agent(
            AgentConfig(
                target=options.target,
                model=options.served_model,
                worker=worker,
                max_lines=max_lines,
                grace_s=options.grace_s,
                health=options.health_listen,
                name=options.name,
                traces=traces,
            )
        )


def _load(options: AgentOptions, scratch: Path) -> LoadedModel:
    """For the engine's thread."""
    checkpoint = Checkpoint.open(options.engine.model)
    dtype = chosen_dtype(options.engine.dtype, options.engine.device)
    config = replace(engine_config(options.engine, checkpoint.spec, dtype, scratch), sharing=options.sharing)
    loaded = load_engine(checkpoint, checkpoint.digest().hex(), config)
    log.info("loaded %s as %s; %s", options.engine.model, dtype, describe_tiers(loaded, config))
    return loaded
