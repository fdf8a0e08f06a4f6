"""`spillway serve --model`: the service on one machine in one command, its agent living and ending with it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent_processes import Jobs, until

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
AGENT = ["--device", "cpu", "--dtype", "float32", "--device-kv", "2MiB", "--host-kv", "0"]


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port; ended with the block, whatever happens."""
    command = [sys.executable, "-m", "spillway.cli.main", "serve", "--jobs-dir", str(folder / "jobs")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline().rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def agents_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(each) for each in children.read_text().split()] if children.exists() else []


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_one_command_answers_jobs_and_takes_its_agent_along(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where callers need tokens: the agent of the house has its own."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{hashlib.sha256(b'mine').hexdigest()} default client\n")
    options = ["--model", str(tiny_checkpoint("llama")), "--served-model", "tiny", "--tokens", str(tokens)]
    with served(tmp_path, *options, "--", *AGENT) as (process, port), Jobs(port, "mine") as jobs:
        name = jobs.submit([LINE | {"body": {"model": "tiny", "prompt": "the quick", "max_tokens": 4}}])
        assert jobs.wait(name).lines.completed == 1
        (agent,) = agents_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
        assert gone(agent)
    with served(tmp_path, *options, "--", *AGENT) as (process, port):
        until(lambda: len(agents_of(process.pid)) == 1, "the agent starts")
        (agent,) = agents_of(process.pid)
        process.kill()
        until(lambda: gone(agent), "the agent of a killed gateway ends")


def test_an_agent_that_cannot_start_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    with served(tmp_path, "--model", str(tmp_path / "nothing")) as (process, _):
        assert process.wait(120) == 1
    log = (tmp_path / "log").read_text()
    assert "the agent ended with status 1" in log
    assert "Traceback" not in log


def test_options_of_an_agent_need_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="invalid literal"), served(tmp_path, "--", "--device", "cpu"):
        pass
    assert "need --model" in (tmp_path / "log").read_text()
