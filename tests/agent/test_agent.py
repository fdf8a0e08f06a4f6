"""Agents and a gateway as real processes: every line is answered as `spillway run` answers it, whatever happens."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_processes import Jobs, Processes, answers, free_port, listening, metric, page, processes, ready, until
from certificates import Authority
from commands import refused
from typer.testing import CliRunner

from spillway.cli.main import app

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "and",
    "a",
    "batch",
    "shares",
    "its",
    "documents",
]


def lines(number: int, max_tokens: int = 24) -> list[dict[str, Any]]:
    """Greedy and sampled lines over three shared documents; some with several choices or prompts."""
    documents = [" ".join(WORDS[(3 * place + shift) % len(WORDS)] for place in range(60)) for shift in range(3)]
    found = []
    for each in range(number):
        body: dict[str, Any] = {"model": "tiny", "prompt": f"{documents[each % 3]} {each}", "max_tokens": max_tokens}
        body |= {"temperature": 0, "ignore_eos": True} if each % 4 else {"temperature": 0.8, "n": 1 + each % 3}
        if each % 7 == 5:
            body["prompt"] = [body["prompt"], f"a lazy dog {each}"]
        found.append({"custom_id": f"r{each}", "method": "POST", "url": "/v1/completions", "body": body})
    return found


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def quiet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `spillway run` answers to all the lines there are."""
    folder = tmp_path_factory.mktemp("quiet")
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in lines(160)))
    command = [sys.executable, "-m", "spillway.cli.main", "run", "--model", str(model), "--input", str(source)]
    subprocess.run([*command, "--output", str(output), "--dtype", "float32", "--host-kv", "0"], check=True, timeout=280)
    return answers(output.read_bytes())


def expected(quiet: dict[str, Any], number: int) -> dict[str, Any]:
    return {f"r{each}": quiet[f"r{each}"] for each in range(number)}


def test_lines_are_answered_as_by_run_and_sigterm_ends_in_peace(
    model: Path, quiet: dict[str, Any], started: Processes
) -> None:
    port, health = free_port(), free_port()
    agent = started.agent(model, port, health)
    until(lambda: page(health, "/healthz")[0] == 200, "the agent lives")
    until(lambda: "Lease" in page(health, "/readyz")[1], "without a gateway it is not ready, and says why")
    started.gateway(port)
    until(lambda: ready(health), "the agent found the gateway")
    with Jobs(port) as jobs:
        name = jobs.submit(lines(40))
        job = jobs.wait(name)
        assert (job.lines.completed, job.lines.failed) == (40, 0)
        assert jobs.output(name) == expected(quiet, 40)
    assert metric(health, "spillway_agent_lines_answered_total") == 40
    assert metric(health, "spillway_engine_reused_tokens_total") > 0
    assert metric(health, "spillway_agent_lines_held") == 0
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(60) == 0


def test_killed_and_stopped_agents_lose_no_line(model: Path, quiet: dict[str, Any], started: Processes) -> None:
    port, healths = free_port(), [free_port() for _ in range(3)]
    started.gateway(port)
    killed, stopped = (started.agent(model, port, health) for health in healths[:2])
    until(lambda: ready(healths[0]) and ready(healths[1]), "both agents are ready")
    with Jobs(port) as jobs:
        name = jobs.submit(lines(160))
        until(lambda: jobs.completed(name) > 10, "some lines are done")
        killed.kill()
        until(lambda: jobs.completed(name) > 30, "the other goes on")
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(60) == 0
        before = jobs.get(name)
        assert before.lines.pending > 0, "both were done before they could be stopped"
        until(lambda: jobs.get(name).lines.leased == 0, "what they had is free again")
        started.agent(model, port, healths[2])
        assert jobs.wait(name).lines.completed == 160
        assert jobs.output(name) == quiet
    assert "stopped" in started.log(f"agent-{healths[1]}")


def test_a_restarted_gateway_finds_its_agent_again(model: Path, quiet: dict[str, Any], started: Processes) -> None:
    port, health = free_port(), free_port()
    gateway = started.gateway(port)
    started.agent(model, port, health)
    until(lambda: ready(health), "the agent is ready")
    with Jobs(port) as jobs:
        name = jobs.submit(lines(160))
        until(lambda: jobs.completed(name) > 10, "some lines are done")
        gateway.kill()
        gateway.wait()
        until(lambda: not ready(health), "the agent noticed")
        started.gateway(port)
        assert jobs.wait(name).lines.completed == 160
        assert jobs.output(name) == quiet
    until(lambda: ready(health), "the agent is ready again")


def test_a_cancelled_job_frees_the_engine(model: Path, started: Processes) -> None:
    port, health = free_port(), free_port()
    started.gateway(port)
    started.agent(model, port, health)
    with Jobs(port) as jobs:
        name = jobs.submit(lines(60, max_tokens=300))
        until(lambda: metric(health, "spillway_agent_lines_leased_total") > 0, "lines are leased")
        until(lambda: metric(health, "spillway_engine_pool_used_blocks") > 0, "lines run")
        jobs.cancel(name)
        until(lambda: metric(health, "spillway_engine_pool_used_blocks") == 0, "no sequence holds a block")
        assert jobs.get(name).state
    assert metric(health, "spillway_agent_lines_held") == 0
    assert metric(health, "spillway_agent_leases_lost_total") > 0


def test_a_wrong_token_is_told_and_a_new_one_taken_up(
    model: Path, quiet: dict[str, Any], started: Processes, tmp_path: Path
) -> None:
    port, health = free_port(), free_port()
    tokens, mine = tmp_path / "tokens", tmp_path / "token"
    rows = [
        f"{hashlib.sha256(token).hexdigest()} default {kind}" for token, kind in ((b"A", "agent"), (b"C", "client"))
    ]
    tokens.write_text("\n".join(rows))
    mine.write_text("wrong-secret")
    started.gateway(port, str(tokens))
    started.agent(model, port, health, "--token-file", str(mine))
    until(lambda: "UNAUTHENTICATED" in page(health, "/readyz")[1], "the refusal is told")
    assert page(health, "/healthz")[0] == 200
    mine.write_text("A\n")
    until(lambda: ready(health), "the new token is taken up")
    with Jobs(port, "C") as jobs:
        name = jobs.submit(lines(8))
        jobs.wait(name)
        assert jobs.output(name) == expected(quiet, 8)
    assert "wrong-secret" not in started.log(f"agent-{health}")


def kv(*arguments: str) -> tuple[int, str]:
    """`spillway kv …` within this process: its exit status, and what it prints."""
    ended = CliRunner().invoke(app, ["kv", *arguments])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.output


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server on PATH")
def test_blocks_of_one_agent_serve_another_and_people_find_them(
    model: Path, quiet: dict[str, Any], started: Processes, tmp_path: Path
) -> None:
    """Agents show each other certificates, and so do the commands for people."""
    port, redis, healths = free_port(), free_port(), [free_port(), free_port()]
    authority, secret, source = Authority(tmp_path), tmp_path / "secret", tmp_path / "in.jsonl"
    secret.write_text("a secret of more than sixteen bytes")
    source.write_text("".join(json.dumps(each) + "\n" for each in lines(3)))

    def certified(name: str) -> list[str]:
        pair = authority.certify(name)
        files = ["--peer-tls-cert", str(pair.certificate), "--peer-tls-key", str(pair.key)]
        return ["--peer-token-file", str(secret), *files, "--peer-tls-ca", str(authority.certificate)]

    started.gateway(port)
    started.run("redis-server", "--port", str(redis), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path))
    until(lambda: listening(redis), "Redis listens")
    index = ["--kv-index", f"redis://127.0.0.1:{redis}/0"]
    for health, served in zip(healths, ("tiny", "other"), strict=True):
        more = ["--peer-listen", f"127.0.0.1:{free_port()}", "--device-kv", "300KiB", "--name", served]
        started.agent(model, port, health, *index, *certified(served), *more, "--served-model", served)
        until(lambda health=health: ready(health), "the agent is ready")
        with Jobs(port) as jobs:
            name = jobs.submit(lines(40), served)
            jobs.wait(name)
            assert jobs.output(name) == expected(quiet, 40)
    assert metric(healths[0], 'spillway_kv_tier_stores_total{tier="host"}') > 0
    assert metric(healths[1], 'spillway_kv_tier_hits_total{tier="peer"}') > 0
    assert metric(healths[1], "spillway_kv_index_lease_held") == 1
    job = ["--model", str(model), "--input", str(source), "--dtype", "float32"]
    status, shown = kv("where", *job, *index, "--json")
    prompts = [json.loads(row) for row in shown.splitlines()]
    assert [prompt["custom_id"] for prompt in prompts] == ["r0", "r1", "r2"]
    assert all(prompt["found_from_start"] > 0 for prompt in prompts), "blocks are named as the agents name them"
    person = certified("person")
    status, shown = kv("verify", *index, *person)
    assert status == 0, shown
    assert kv("warm", "--node", "tiny", *job, *index, *person, "--line", "1")[0] in (0, 3)
    found = json.loads(kv("status", *index, "--json")[1])["identities"][0]["nodes"]
    assert {node["node"]: node["live"] for node in found} == {"tiny": True, "other": True}
    assert all(node["figures"]["hit_share"] is not None for node in found)
    stranger = Authority(tmp_path, "another").certify("stranger")
    person[3], person[5] = str(stranger.certificate), str(stranger.key)
    status, shown = kv("verify", *index, *person)
    assert status == 3
    assert "whole" not in shown.replace("0 whole", "")


def test_what_is_wrong_with_the_command_is_said(model: Path, tmp_path: Path) -> None:
    command = ["agent", "--model", model, "--gateway", "127.0.0.1:1"]
    assert "cannot be read" in refused(*command, "--token-file", tmp_path / "nothing")
    assert "--tls" in refused(*command, "--tls-cert", tmp_path / "x")
    assert "HOST:PORT" in refused(*command, "--health-listen", "127.0.0.1:0x")
