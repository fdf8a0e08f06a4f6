"""Real agents and their gateway are killed, frozen, stopped at random: each line once, answered as in a quiet run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_processes import Jobs, Processes, answers, free_port, processes, until
from test_agent import lines

from spillway.api.batch.v1 import batch_pb2

LINES = 1200
AGENTS = 2
CALM_AFTER = 25
"""Disturbances; from then on nothing happens, so that the job ends."""


class Ground:
    """A gateway and its agents, and a dice that says what befalls them."""

    def __init__(self, started: Processes, model: Path, seed: int) -> None:
        self.started, self.model, self.dice = started, model, random.Random(seed)
        self.port, self.befell = free_port(), Counter[str]()
        self.gateway = started.gateway(self.port)
        self.agents = [self.agent() for _ in range(AGENTS)]

    def agent(self) -> subprocess.Popen[bytes]:
        return self.started.agent(self.model, self.port, free_port(), "--grace", "5")

    def disturb(self) -> None:
        what = self.dice.choice(["agent killed", "agent killed", "agent stopped", "agent frozen", "gateway killed"])
        self.befell[what] += 1
        if what == "gateway killed":
            self.gateway.kill()
            self.gateway.wait()
            time.sleep(self.dice.choice([0.0, 1.0]))
            self.gateway = self.started.gateway(self.port)
            return
        number = self.dice.randrange(AGENTS)
        agent = self.agents[number]
        if what == "agent frozen":  # for longer than its leases last: it wakes up to find its lines with others
            agent.send_signal(signal.SIGSTOP)
            time.sleep(self.dice.uniform(0, 6))
            agent.send_signal(signal.SIGCONT)
            return
        agent.send_signal(signal.SIGTERM if what == "agent stopped" else signal.SIGKILL)
        agent.wait(60)
        self.agents[number] = self.agent()


def quiet_run(model: Path, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `spillway run` answers."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in rows))
    command = [sys.executable, "-m", "spillway.cli.main", "run", "--model", str(model), "--input", str(source)]
    subprocess.run([*command, "--output", str(output), "--dtype", "float32", "--host-kv", "0"], check=True)
    return answers(output.read_bytes())


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(2))
def test_every_line_once_and_as_in_a_quiet_run(tiny_checkpoint: Callable[..., Path], tmp_path: Path, seed: int) -> None:
    model, rows = tiny_checkpoint("llama"), lines(LINES)
    quiet = quiet_run(model, tmp_path, rows)
    with processes(tmp_path) as started:
        ground = Ground(started, model, seed)
        with Jobs(ground.port) as jobs:
            name = jobs.submit(rows)
            until(lambda: jobs.completed(name) > 0, "the first line is done")
            while ground.befell.total() < CALM_AFTER and jobs.get(name).state < batch_pb2.Job.COMPLETED:
                ground.disturb()
                time.sleep(ground.dice.uniform(0, 4))
            until(lambda: jobs.get(name).state >= batch_pb2.Job.COMPLETED, "the job ends")
            job = jobs.get(name)
            assert (job.state, job.lines.completed, job.lines.failed) == (batch_pb2.Job.COMPLETED, LINES, 0)
            assert jobs.output(name) == quiet  # by custom_id; two results of one line are an error there
    assert ground.befell["gateway killed"], ground.befell
    assert ground.befell["agent killed"], ground.befell
