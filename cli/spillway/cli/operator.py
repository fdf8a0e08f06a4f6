"""`spillway operator`: a cluster held to its resources."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated

import typer


def operator(
    agent_image: Annotated[str, typer.Option(help="Image of agents, whose entry point is `spillway`.")],
    gateway: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where agents get their lines.")],
    namespace: Annotated[str, typer.Option(help="Where the Lease is that one operator holds.")] = "default",
) -> None:
    """Run agents for the ModelDeployments of a cluster, until SIGTERM.

    Killed or away, nothing stops: agents go on, and the next operator goes on from what it finds.
    """
    from spillway.operator.desired.agents import AgentSettings
    from spillway.operator.process import run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run(AgentSettings(agent_image, gateway), namespace))
