"""One trace a job over processes: a real gateway and its agent, their spans received as OTLP sends them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from otlp_receiver import Received, Receiver, receiving
from test_serve_with_model import AGENT, served
from typer.testing import CliRunner

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.cli.main import app

TRACE, SPAN = "0123456789abcdef0123456789abcdef", "0123456789abcdef"
CALLER = f"00-{TRACE}-{SPAN}-01"
LINES = [
    {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 4, "ignore_eos": True},
    }
    for number in range(6)
]
CONTENT = "".join(json.dumps(line) + "\n" for line in LINES).encode()
SERVER, CLIENT = 2, 3


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def submit(stub: Any, traceparent: str) -> str:
    def messages() -> Iterator[batch_pb2.SubmitJobRequest]:
        yield batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="tiny"), input=CONTENT)

    metadata = (("traceparent", traceparent),)
    name = stub.SubmitJob(messages(), metadata=metadata, wait_for_ready=True, timeout=60).name
    for message in stub.WatchJob(batch_pb2.WatchJobRequest(name=name), timeout=240):
        last = message.job
    assert (last.state, last.lines.completed) == (batch_pb2.Job.COMPLETED, len(LINES))
    return str(name)


@pytest.fixture(scope="module")
def spans(
    receiver: Receiver, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Received]:
    """Of one job, all of them: the processes have ended."""
    folder = tmp_path_factory.mktemp("traces")
    options = ["--model", str(tiny_checkpoint("llama")), "--served-model", "tiny", "--", *AGENT]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in receiver.environment.items():
            patch.setenv(name, value)
        with served(folder, *options) as (process, port):
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub: Any = batch_pb2_grpc.BatchServiceStub(channel)
                submit(stub, CALLER)
                submit(stub, CALLER.replace(TRACE, "f" * 32)[:-1] + "0")  # whose caller keeps no trace
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (folder / "log").read_text()
    return receiver.of(TRACE, "job", "work")


def test_the_tree_reaches_from_the_caller_to_the_last_token(spans: list[Received]) -> None:
    by_id = {span.id: span for span in spans}

    def path(span: Received) -> list[str]:
        above = by_id.get(span.parent)
        return [*(path(above) if above is not None else [span.parent]), f"{span.service[9:]} {span.name}"]

    below = "gateway job", "gateway lease", "agent work"
    assert {" > ".join(path(span)) for span in spans} == {
        f"{SPAN} > {' > '.join(names)}"
        for names in (
            ("gateway job",),
            ("gateway job", "gateway submit"),
            ("gateway job", "gateway validate"),
            ("gateway job", "gateway lease"),
            ("gateway job", "gateway seal"),
            below,
            (*below, "agent prefill"),
            (*below, "agent decode"),
            (*below, "agent complete"),
            (*below, "agent complete", "gateway result"),
        )
    }
    assert {span.service for span in spans} == {"spillway-gateway", "spillway-agent"}
    for span in spans:
        above = by_id.get(span.parent)
        assert span.start_ns <= span.end_ns
        assert not span.error
        if above is not None and span.name != "work":  # one clock; the last report may come after the gateway's lease
            assert above.start_ns <= span.start_ns


def test_what_was_done_is_what_they_say(spans: list[Received]) -> None:
    def total(name: str, attribute: str) -> int:
        return sum(span.attributes[attribute] for span in spans if span.name == name)

    generated = 4 * len(LINES)
    assert total("lease", "spillway.lines") == total("work", "spillway.lines") == len(LINES)
    assert total("result", "spillway.accepted") == total("complete", "spillway.results") == len(LINES)
    assert total("decode", "gen_ai.usage.output_tokens") == total("work", "gen_ai.usage.output_tokens") == generated
    (job,) = [span for span in spans if span.name == "job"]
    assert job.attributes["gen_ai.usage.output_tokens"] == generated
    assert job.attributes["gen_ai.usage.input_tokens"] == total("prefill", "gen_ai.usage.input_tokens") > 0
    for span in spans:
        if span.name == "decode":
            assert 3 <= span.attributes["spillway.steps"] < generated  # steps, and no span a token
    assert {span.kind for span in spans if span.name in ("submit", "lease", "result")} == {SERVER}
    assert {span.kind for span in spans if span.name == "complete"} == {CLIENT}


def test_a_caller_that_keeps_no_trace_gets_none(spans: list[Received], receiver: Receiver) -> None:
    assert spans
    assert "f" * 32 not in receiver.traces()


def test_run_tells_of_itself_too(
    receiver: Receiver, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_bytes(CONTENT)
    trace = "a" * 32
    for name, value in (receiver.environment | {"TRACEPARENT": CALLER.replace(TRACE, trace)}).items():
        monkeypatch.setenv(name, value)
    command = ["run", "--model", str(tiny_checkpoint("llama")), "--input", str(tmp_path / "in.jsonl")]
    command += ["--output", str(tmp_path / "out.jsonl"), "--dtype", "float32", "--host-kv", "0"]
    assert CliRunner().invoke(app, command).exit_code == 0
    found = {span.name: span for span in receiver.of(trace, "job", "validate", "run")}
    assert found["job"].parent == SPAN
    assert found["validate"].parent == found["run"].parent == found["job"].id
    assert found["run"].attributes["spillway.lines_completed"] == len(LINES)
    assert {span.service for span in found.values()} == {"spillway-run"}


def test_a_receiver_that_is_not_there_holds_nobody_up(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_bytes(CONTENT)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("spillway.api.otlp.FLUSH_S", 0.5)
    command = ["run", "--model", str(tiny_checkpoint("llama")), "--input", str(tmp_path / "in.jsonl")]
    command += ["--output", str(tmp_path / "out.jsonl"), "--dtype", "float32", "--host-kv", "0"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == len(LINES)
