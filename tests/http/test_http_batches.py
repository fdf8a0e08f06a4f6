"""Batches over HTTP with the official client, against a worker that answers what it likes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from http_ground import Door, lines, prompts, serving, until
from otlp_receiver import receiving

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with serving(tmp_path_factory.mktemp("door"), tokens=True) as door:
        assert not door.work(wait_s=0)  # from now on it is known what is served
        yield door


def rows(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(row) for row in content.splitlines()]


def test_from_upload_to_results(door: Door) -> None:
    with door.client() as client:
        file = client.files.create(file=("batch.jsonl", prompts(25)), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="24h",
            metadata={"team": "a"},
        )
        assert (batch.object, batch.input_file_id, batch.endpoint) == ("batch", file.id, "/v1/completions")
        assert (batch.completion_window, batch.metadata) == ("24h", {"team": "a"})
        assert batch.expires_at == pytest.approx(batch.created_at + 86400, abs=1)
        assert batch.output_file_id is None
        client.files.delete(file.id)  # the batch has its input
        door.drain(25)
        ended = door.ended(batch.id)
        assert (ended.status, ended.completed_at is not None) == ("completed", True)
        counts = ended.request_counts
        assert (counts.total, counts.completed, counts.failed) == (25, 22, 3)
        output = rows(client.files.content(ended.output_file_id).read())
        assert [row["custom_id"] for row in output] == [f"r{index}" for index in range(25) if index % 10]
        assert [row["response"]["body"]["answer"] for row in output] == [index for index in range(25) if index % 10]
        errors = rows(client.files.content(ended.error_file_id).read())
        assert [(row["custom_id"], row["error"]["code"]) for row in errors] == [
            (f"r{index}", "invalid_parameter") for index in (0, 10, 20)
        ]
        made = client.files.retrieve(ended.output_file_id)
        assert (made.purpose, made.bytes) == ("batch_output", len(client.files.content(made.id).read()))
        assert {ended.output_file_id, ended.error_file_id} <= {f.id for f in client.files.list(purpose="batch_output")}
        client.files.delete(ended.output_file_id)
        assert client.batches.retrieve(batch.id).output_file_id is None
        with pytest.raises(openai.NotFoundError):
            client.files.content(ended.output_file_id)
        assert client.files.content(ended.error_file_id).read()


def test_there_is_an_output_file_even_if_every_line_failed(door: Door) -> None:
    bad = lines({"prompt": 5}).replace(b"r0", b"bad")
    name = door.batch(prompts(1) + bad)
    door.drain(1)  # index 0, which fails
    ended = door.ended(name)
    with door.client() as client:
        assert client.files.content(ended.output_file_id).read() == b""
        errors = rows(client.files.content(ended.error_file_id).read())
    assert [(row["custom_id"], row["error"]["code"]) for row in errors] == [
        ("r0", "invalid_parameter"),
        ("bad", "invalid_parameter"),
    ]
    assert errors[0]["error"]["message"] == "unlucky"


def test_cancel_keeps_what_is_done_and_may_be_repeated(door: Door) -> None:
    name = door.batch(prompts(30))
    door.drain(5)
    with door.client() as client:
        cancelled = client.batches.cancel(name)
        assert cancelled.status in ("cancelling", "cancelled")
        ended = door.ended(name)
        assert (ended.status, ended.cancelled_at is not None) == ("cancelled", True)
        assert client.batches.cancel(name).status == "cancelled"
        codes = [row["error"]["code"] for row in rows(client.files.content(ended.error_file_id).read())]
        done = len(rows(client.files.content(ended.output_file_id).read()))
    assert done >= 2
    assert set(codes) <= {"cancelled", "invalid_parameter"}
    assert len(codes) + done == 30


def test_repeating_a_create_under_one_key_finds_the_same_batch(door: Door) -> None:
    file = door.upload(prompts(2))
    wanted = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "1h"}
    with door.client() as client:
        key = {"Idempotency-Key": "once"}
        names = {client.batches.create(**wanted, extra_headers=key).id for _ in range(3)}
        assert len(names) == 1
        with pytest.raises(openai.ConflictError) as refused:
            client.batches.create(**(wanted | {"completion_window": "2h"}), extra_headers=key)
        assert refused.value.code == "request_id_reused"
        assert client.batches.create(**wanted).id not in names
    door.drain(4)


def test_batches_are_listed_by_page_and_each_tenants_own(door: Door) -> None:
    names = [door.batch(prompts(1), "token-of-b") for _ in range(4)]
    with door.client("token-of-b") as client:
        assert [each.id for each in client.batches.list(limit=3)] == names[::-1]
        assert [each.id for each in client.batches.list(after=names[2], limit=1).data] == [names[1]]
        for name in names:
            client.batches.cancel(name)
    with door.client() as stranger:
        for call in (stranger.batches.retrieve, stranger.batches.cancel):
            with pytest.raises(openai.NotFoundError) as refused:
                call(names[0])
            assert refused.value.code == "job_not_found"
        assert not {each.id for each in stranger.batches.list(limit=100)} & set(names)
    for name in names:
        door.ended(name, "token-of-b")


def test_a_job_over_grpc_is_a_batch_too(door: Door) -> None:
    import grpc

    token = (("authorization", "Bearer token-of-a"),)
    with grpc.insecure_channel(f"127.0.0.1:{door.grpc_port}") as channel:
        stub = batch_pb2_grpc.BatchServiceStub(channel)
        message = batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="tiny", labels={"k": "v"}), input=prompts(3))
        job = stub.SubmitJob(iter([message]), metadata=token, timeout=60).name
        over_http = stub.GetJob(
            batch_pb2.GetJobRequest(name=door.batch(prompts(1)).replace("batch_", "jobs/")), metadata=token, timeout=60
        )
        assert over_http.model == "tiny"
    door.drain(4)
    ended = door.ended(job.replace("jobs/", "batch_"))
    assert (ended.status, ended.metadata) == ("completed", {"k": "v"})
    with door.client() as client:
        assert client.files.content(ended.input_file_id).read() == prompts(3)
        with pytest.raises(openai.ConflictError):
            client.files.delete(ended.input_file_id)


def test_lines_of_a_batch_name_its_endpoint_and_one_model(door: Door) -> None:
    chat = lines({"messages": [{"role": "user", "content": "hi"}]}, url="/v1/chat/completions")
    content = (
        prompts(2) + chat.replace(b'"r0"', b'"chat"') + lines({"model": "other", "prompt": "x"}).replace(b"r0", b"o")
    )
    name = door.batch(content)
    door.drain(2)
    ended = door.ended(name)
    with door.client() as client:
        errors = {row["custom_id"]: row["error"] for row in rows(client.files.content(ended.error_file_id).read())}
    assert (errors["chat"]["code"], errors["chat"]["param"]) == ("invalid_request", "url")
    assert (errors["o"]["code"], errors["o"]["param"]) == ("invalid_parameter", "model")
    assert ended.model == "tiny"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json\n", "line 1: not JSON"),
        (b"\n\n", "no request line"),
        (lines({"prompt": "x"}), "valid request for /v1/chat/completions"),
        (b"\x1f\x8b compressed", "gzip"),
        ("{}".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_that_is_no_batch_is_refused_at_once(door: Door, content: bytes, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        door.batch(content, endpoint="/v1/chat/completions")
    assert message in refused.value.message


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, 400, "invalid_argument", "endpoint"),
        ({"endpoint": 5}, 400, "invalid_argument", "endpoint"),
        ({"completion_window": "soon"}, 400, "invalid_argument", "completion_window"),
        ({"metadata": {"k": 5}}, 400, "invalid_argument", "metadata[...]"),
        ({"metadata": {str(number): "" for number in range(17)}}, 400, "invalid_argument", None),
        ({"unknown": 1}, 400, "invalid_argument", "unknown"),
        ({"input_file_id": "file-0"}, 404, "file_not_found", None),
        ({"input_file_id": "nothing"}, 404, "file_not_found", None),
    ],
)
def test_a_bad_create_is_said(door: Door, change: dict[str, Any], status: int, code: str, param: str | None) -> None:
    wanted = {"input_file_id": door.upload(prompts(1)), "endpoint": "/v1/completions", "completion_window": "24h"}
    refused = door.call("POST", "/v1/batches", body=json.dumps(wanted | change).encode())
    assert (refused.status, refused.code, refused.json["error"]["param"]) == (status, code, param)


def test_an_unknown_model_is_refused_while_others_are_served(door: Door) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        door.batch(lines({"model": "tyni", "prompt": "x"}))
    assert refused.value.code == "model_not_found"
    assert "tiny" in refused.value.message
    with door.client() as client:
        assert [(each.id, each.object) for each in client.models.list()] == [("tiny", "model")]
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/other")


def test_the_window_is_the_deadline(door: Door) -> None:
    name = door.batch(prompts(1), completion_window="90m")
    with door.client() as client:
        made = client.batches.retrieve(name)
    assert made.expires_at - made.created_at in (5399, 5400)
    door.drain(1)


def test_metrics_tell_what_happened(door: Door) -> None:
    before = figures(door)
    name = door.batch(prompts(20))
    with door.client() as client:
        until(lambda: client.batches.retrieve(name).status == "in_progress", "it runs")
    waiting = figures(door)
    assert waiting['spillway_gateway_queue_lines{model="tiny"}'] == 20
    assert waiting['spillway_gateway_oldest_pending_seconds{model="tiny"}'] >= 0
    assert waiting['spillway_gateway_jobs{state="running"}'] == 1
    door.drain(20)
    door.ended(name)
    after = figures(door)

    def grown(figure: str) -> float:
        return after[figure] - before.get(figure, 0.0)

    assert grown("spillway_gateway_jobs_submitted_total") == 1
    assert grown("spillway_gateway_input_bytes_total") == len(prompts(20))
    assert grown("spillway_gateway_lines_leased_total") == 20
    assert grown("spillway_gateway_lines_completed_total") == 18
    assert grown("spillway_gateway_lines_failed_total") == 2
    assert grown("spillway_gateway_leases_granted_total") >= 1
    assert grown('spillway_gateway_lines{result="completed"}') == 18
    assert grown('spillway_gateway_rpc_seconds_count{code="OK",method="Lease"}') >= 1
    assert grown('spillway_gateway_http_seconds_count{method="POST",route="/v1/batches",status="200"}') == 1
    assert after["spillway_gateway_leases"] == 0
    assert after['spillway_gateway_queue_lines{model="tiny"}'] == 0


def test_labels_hold_nothing_that_callers_choose(door: Door) -> None:
    for path in ("/v1/files/file-secret", "/secret", "/v1/models/secret/x"):
        door.call("GET", path)
        door.call("SECRET", path)
    text = door.call("GET", "/metrics", "monitor").content.decode()
    assert "secret" not in text.lower()
    assert 'route="none"' in text


def figures(door: Door) -> dict[str, float]:
    answer = door.call("GET", "/metrics", "monitor")
    assert answer.status == 200
    found = {}
    for row in answer.content.decode().splitlines():
        if not row.startswith("#"):
            name, _, value = row.rpartition(" ")
            found[name] = float(value)
    return found


def test_a_batch_tells_when_it_came_where_and_a_restart_forgets_none(tmp_path: Path) -> None:
    with serving(tmp_path) as door:
        door.work(wait_s=0)
        done, stopped = door.batch(prompts(2)), door.batch(prompts(3))
        with door.client() as client:
            running = until(lambda: _running(client.batches.retrieve(done)), "the lines are checked")
            assert running.created_at <= running.in_progress_at <= int(time.time())
            assert (running.finalizing_at, running.cancelling_at, running.completed_at) == (None, None, None)
            cancelling = client.batches.cancel(stopped)
            assert cancelling.created_at <= cancelling.cancelling_at
            door.drain(2)
            ended = {name: door.ended(name) for name in (done, stopped)}
    completed, cancelled = ended[done], ended[stopped]
    assert completed.in_progress_at <= completed.finalizing_at <= completed.completed_at
    assert completed.in_progress_at == running.in_progress_at
    assert completed.cancelling_at is None
    assert cancelled.cancelling_at <= cancelled.cancelled_at
    with serving(tmp_path) as door, door.client() as client:
        for name, before in ended.items():
            after = client.batches.retrieve(name)
            for moment in ("created", "in_progress", "finalizing", "cancelling", "cancelled", "completed"):
                assert getattr(after, f"{moment}_at") == getattr(before, f"{moment}_at")


def _running(batch: Any) -> Any:
    return batch if batch.status == "in_progress" else None


def test_output_files_are_kept_for_as_long_as_was_asked(tmp_path: Path) -> None:
    with serving(tmp_path) as door:
        door.work(wait_s=0)
        name = door.batch(prompts(2), output_expires_after={"anchor": "created_at", "seconds": 3600})
        door.drain(2)
        ended = door.ended(name)
        with door.client() as client:
            for file in (ended.output_file_id, ended.error_file_id):
                made = client.files.retrieve(file)
                assert made.expires_at == made.created_at + 3600
            assert client.files.content(ended.output_file_id).read()
            file = door.upload(prompts(1))
            for expiry, param in (
                ({"anchor": "created_at", "seconds": 3599}, "output_expires_after.seconds"),
                ({"anchor": "created_at", "seconds": 30 * 86400 + 1}, "output_expires_after.seconds"),
                ({"anchor": "now", "seconds": 3600}, "output_expires_after.anchor"),
            ):
                with pytest.raises(openai.BadRequestError) as refused:
                    client.batches.create(
                        input_file_id=file,
                        endpoint="/v1/completions",
                        completion_window="24h",
                        output_expires_after=expiry,
                    )
                assert (refused.value.code, refused.value.param) == ("invalid_argument", param)
    folder = tmp_path / "jobs" / "jobs" / name.removeprefix("batch_")
    for record in (folder / "job.json", folder / "job.json.copy"):  # time passes
        spec = json.loads(record.read_text())
        record.write_text(json.dumps(spec | {"outcome": spec["outcome"] | {"end_s": 1.0}}))
    with serving(tmp_path) as door, door.client() as client:
        with pytest.raises(openai.NotFoundError) as gone:
            client.files.content(ended.output_file_id)
        assert gone.value.code == "file_not_found"
        until(lambda: not (folder / "output.jsonl").exists(), "the files are removed")
        until(lambda: not (folder / "errors.jsonl").exists(), "the files are removed")
        assert not (folder / "output.jsonl.spillway" / "results.log").exists()
        batch = client.batches.retrieve(name)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("completed", None, None)
        assert batch.request_counts.total == 2


def test_the_trace_of_a_batch_hangs_on_the_call_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, span = "0123456789abcdef0123456789abcdef", "0123456789abcdef"
    with receiving() as receiver:
        for name, value in receiver.environment.items():
            monkeypatch.setenv(name, value)
        with serving(tmp_path) as door:
            made = door.batch(prompts(1), extra_headers={"traceparent": f"00-{trace}-{span}-01"})
            with door.client() as client:
                client.batches.cancel(made)
            door.ended(made)
        (job,) = [each for each in receiver.of(trace, "job") if each.name == "job"]
    assert job.parent == span
    assert job.attributes["spillway.job"] == f"jobs/{made.removeprefix('batch_')}"
    assert job.attributes["spillway.state"] == "cancelled"
