"""`spillway operator`: a cluster held to its resources."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer


def operator(
    config: Annotated[Path, typer.Option(help="What agents are made of and where the gateway is, JSON.")],
    namespace: Annotated[
        str | None, typer.Option(help="Where the Lease is that one operator holds. Default: that of the own pod.")
    ] = None,
    health_listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where /healthz is. Default: nowhere.")
    ] = None,
) -> None:
    """Carry out the ModelDeployments, BatchJobs and KVStores of a cluster, until SIGTERM.

    Killed or away, nothing stops: agents go on, and the next operator goes on from what it finds. Ends with status 1
    when another operator has taken over.
    """
    from spillway.operator.config import OperatorConfig
    from spillway.operator.leadership import LeadershipLostError
    from spillway.operator.process import Process, own_namespace, run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Of Kopf a person needs what goes wrong, not its own doings; of its objects nothing: we say what we do with them.
    logging.getLogger("kopf").setLevel(logging.WARNING)
    process = Process(OperatorConfig.load(config), namespace or own_namespace(), health_listen)
    try:
        asyncio.run(run(process))
    except LeadershipLostError as error:
        print(f"spillway: {error}; start it again", file=sys.stderr)
        raise typer.Exit(1) from error
