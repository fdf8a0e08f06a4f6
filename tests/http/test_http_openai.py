"""The official client and the files of other servers, unmodified, with a real (tiny) model behind the door."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from http_ground import COMMAND, Door, lines, serving, until

DOCS = Path(__file__).parents[2] / "docs" / "service.md"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Iterator[Door]:
    """A gateway that asks for no token, and one agent."""
    folder = tmp_path_factory.mktemp("door")
    with serving(folder) as door, (folder / "agent.log").open("wb") as log:
        command = [*COMMAND, "agent", "--model", str(tiny_checkpoint("llama")), "--served-model", "tiny"]
        command += ["--gateway", f"127.0.0.1:{door.grpc_port}", "--dtype", "float32", "--device", "cpu"]
        command += ["--device-kv", "2MiB", "--host-kv", "4MiB", "--max-batch-tokens", "64"]
        agent = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with door.client() as client:
                until(lambda: agent.poll() is not None or client.models.list().data, "an agent asks for lines")
            assert agent.poll() is None, (folder / "agent.log").read_text()
            yield door
        finally:
            agent.terminate()
            agent.wait(60)


def chat(count: int, **more: object) -> bytes:
    """As users of other servers write their batch files."""
    return lines(
        *(
            {
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": f"What is {number} and {number}?"},
                ],
                "max_completion_tokens": 8,
                "temperature": 0,
            }
            | more
            for number in range(count)
        ),
        url="/v1/chat/completions",
    )


def test_a_whole_batch(door: Door) -> None:
    too_long = chat(1, max_completion_tokens=10**6).replace(b"r0", b"too-long")
    with door.client() as client:
        file = client.files.create(file=("batch.jsonl", chat(6) + too_long), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"run": "1"}
        )
        ended = door.ended(batch.id)
        assert (ended.status, ended.errors) == ("completed", None)
        counts = ended.request_counts
        assert (counts.total, counts.completed, counts.failed) == (7, 6, 1)
        rows = [json.loads(row) for row in client.files.content(ended.output_file_id).text.splitlines()]
        usages = [row["response"]["body"]["usage"] for row in rows]
        assert ended.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages)
        assert ended.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
        assert [row["custom_id"] for row in rows] == [f"r{number}" for number in range(6)]
        for row in rows:
            body = row["response"]["body"]
            assert (row["response"]["status_code"], body["object"], body["model"]) == (200, "chat.completion", "tiny")
            assert 1 <= body["usage"]["completion_tokens"] <= 8
            assert body["choices"][0]["finish_reason"] in ("length", "stop")
        errors = [json.loads(row) for row in client.files.content(ended.error_file_id).text.splitlines()]
        assert [(row["custom_id"], row["error"]["code"]) for row in errors] == [("too-long", "context_length_exceeded")]


def test_cancel_of_a_running_batch(door: Door) -> None:
    with door.client() as client:
        file = client.files.create(file=("batch.jsonl", chat(300, max_completion_tokens=40)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0, "some of it is done")
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        ended = door.ended(batch.id)
        assert ended.status == "cancelled"
        done = client.files.content(ended.output_file_id).text.splitlines()
        codes = {
            json.loads(row)["error"]["code"] for row in client.files.content(ended.error_file_id).text.splitlines()
        }
        assert len(done) == ended.request_counts.completed > 0
        assert codes == {"cancelled"}


def test_the_code_in_the_docs_runs_as_it_stands(door: Door, tmp_path: Path) -> None:
    code = re.search(r"```python\n(from openai import.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "batch.jsonl").write_bytes(chat(2) + b"not json\n")
    (tmp_path / "example.py").write_text(code[1])
    environment = {"OPENAI_BASE_URL": f"http://127.0.0.1:{door.port}/v1", "OPENAI_API_KEY": "any"}
    ran = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(row)["custom_id"] for row in (tmp_path / "out.jsonl").read_text().splitlines()] == ["r0", "r1"]
    errors = [json.loads(row)["error"]["code"] for row in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert errors == ["invalid_json"]


def test_agents_tell_how_they_fare(door: Door) -> None:
    def told() -> dict[str, int] | None:
        agents = door.call("GET", "/api/overview").json["agents"]
        return agents[0]["status"] if agents else None

    status = until(told, "the agent tells")
    assert status["pool_blocks"] > 0
    assert status["prompt_tokens"] > 0
    assert "host" in [tier["name"] for tier in status["tiers"]]
