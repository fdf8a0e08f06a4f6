"""Stopped or killed at any moment and run again: one result per line, none lost, none twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batches import bodies, completion, mixed_lines, run_batch, text, write_lines

from spillway.api.errors import JobChangedError
from spillway.gateway.paths import JobPaths, errors_beside


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


def start(model: Path, source: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spillway.cli.main", "run", "--model", str(model), "--input", str(source)]
    command += ["--output", str(output), "--dtype", "float32", "--device-kv", "300KiB", "--host-kv", "1MiB", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(output: Path) -> int:
    log = output.with_name(output.name + ".spillway") / "results.log"
    return log.stat().st_size if log.exists() else 0


def wait_for_results(process: subprocess.Popen[str], output: Path, more_than_bytes: int) -> None:
    while process.poll() is None and results(output) <= more_than_bytes:
        time.sleep(0.005)


def many_lines() -> list[dict[str, object]]:
    extra = [completion(f"extra{number}", text(number, 30), max_tokens=30, ignore_eos=True) for number in range(120)]
    return [*mixed_lines(), *extra]


def go_on(model: Path, source: Path, output: Path, **changes: Any) -> tuple[bytes, dict[str, Any]]:
    """What the next process would do, in this one: the libraries are loaded already."""
    paths = JobPaths(source, output, errors_beside(output))
    return run_batch(model, source, output, paths=paths, **changes)


@pytest.mark.timeout(400)
def test_killed_again_and_again_it_ends_as_a_quiet_run(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", many_lines())
    quiet, _ = run_batch(model, source, tmp_path / "quiet.jsonl")
    output, chooser, kills = tmp_path / "out.jsonl", random.Random(5), 0
    for _ in range(3):
        process = start(model, source, output, "--disk-kv", "4MiB")
        wait_for_results(process, output, results(output) + chooser.randrange(2000, 15000))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
    assert kills >= 2
    assert go_on(model, source, output)[0] == quiet
    assert set(bodies(output)) == {str(line["custom_id"]) for line in many_lines()}


def test_ctrl_c_stops_within_a_step_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", many_lines())
    output = tmp_path / "out.jsonl"
    process = start(model, source, output)
    wait_for_results(process, output, 3000)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Run the same command again" in message
    assert not output.exists()
    lines = go_on(model, source, output)[1]["lines"]
    assert len(bodies(output)) == len(many_lines())
    assert 0 < lines["done_before"] < lines["total"]


def test_two_runs_of_one_job_do_not_mix(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", many_lines())
    output = tmp_path / "out.jsonl"
    first = start(model, source, output)
    wait_for_results(first, output, 100)
    first.send_signal(signal.SIGSTOP)  # else it may be done before the second has started
    second = start(model, source, output)
    _, message = second.communicate(timeout=120)
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=60)
    assert second.returncode == 1
    assert str(first.pid) in message
    assert first.returncode == 130


def test_another_input_under_the_same_output_is_refused(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", many_lines())
    output = tmp_path / "out.jsonl"
    first = start(model, source, output)
    wait_for_results(first, output, 2000)
    first.kill()
    first.communicate()
    other = write_lines(tmp_path / "other.jsonl", mixed_lines()[:5])
    with pytest.raises(JobChangedError, match="--restart"):
        go_on(model, other, output)
    go_on(model, other, output, restart=True)
    assert len(bodies(output)) == 5


def test_what_is_wrong_with_the_command_is_said_at_once(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines()[:1])
    process = start(model, source, tmp_path / "no" / "out.jsonl")
    _, message = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message.startswith("spillway: ")
    assert "Traceback" not in message
