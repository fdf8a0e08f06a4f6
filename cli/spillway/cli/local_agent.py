"""The agent that `spillway serve --model` runs beside its gateway: a process of its own that lives and ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from spillway.api.client.target import TOKEN_VARIABLE
from spillway.api.errors import SpillwayError

_PROGRAM = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
if os.getppid() != {parent}:  # it died before we asked
    sys.exit(143)
from spillway.cli.main import main
main()
"""
"""A gateway that is killed leaves no agent behind that holds the GPU. The child sees to that itself, since code of ours
between fork and exec would run beside gRPC's threads."""


class LocalAgentError(SpillwayError):
    """The agent ended although nobody asked it to."""


@dataclass(frozen=True, slots=True)
class LocalAgent:
    """What to run: a model, the name that jobs ask for, and options of `spillway agent`."""

    model: str
    served_model: str
    options: tuple[str, ...] = ()

    @contextlib.asynccontextmanager
    async def running(self, socket: Path, token: str, stopped: asyncio.Event) -> AsyncIterator[None]:
        """Leases from the gateway at a Unix socket inside the block, then ends it within its own grace time.

        Sets `stopped` if the agent ends by itself. Raises LocalAgentError then, when the block ends.
        """
        command = [sys.executable, "-c", _PROGRAM.format(parent=os.getpid()), "agent", "--model", self.model]
        command += ["--served-model", self.served_model, "--gateway", f"unix:{socket}", *self.options]
        agent = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env=os.environ | {TOKEN_VARIABLE: token},
            start_new_session=True,  # Ctrl-C reaches us, and we tell it
        )

        async def watch() -> None:
            await agent.wait()
            stopped.set()

        watching = asyncio.create_task(watch(), name="spillway-local-agent")
        try:
            yield
        finally:
            ended_itself = agent.returncode is not None
            with contextlib.suppress(ProcessLookupError):
                agent.terminate()
            await watching
        if ended_itself:
            raise LocalAgentError(
                f"the agent ended with status {agent.returncode}; what it said is above",
                "Jobs are kept: the same command goes on with them.",
            )
