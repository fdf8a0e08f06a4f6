"""Processes of `spillway serve` over one directory: what one of them is asked, the one that has the jobs answers."""

from __future__ import annotations

import hashlib
import http.client
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from http_ground import Answer, Door, lines, prompts, serving, until

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc

BIG_BYTES = 192 << 20
MORE_BYTES = BIG_BYTES // 2  # windows and buffers of both connections: 2 to 44 MiB seen, whatever the upload's size


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, Door]]:
    """The one that has the jobs, and one that passes calls on; both with tokens."""
    folder = tmp_path_factory.mktemp("doors")
    with serving(folder, tokens=True) as owner, serving(folder, tokens=True) as other:
        until(lambda: other.call("GET", "/v1/files").status == 200, "the other has found the owner")
        assert (owns(owner), owns(other)) == (1, 0)
        yield owner, other


def figure(door: Door, name: str) -> float:
    found = re.search(rf"^spillway_gateway_{name} (\S+)$", metrics(door), re.MULTILINE)
    assert found is not None
    return float(found[1])


def owns(door: Door) -> float:
    return figure(door, "owner")


def most_resident_bytes(door: Door) -> int:
    status = Path(f"/proc/{door.process.pid}/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+)", status, re.MULTILINE)[1]) << 10


def test_openais_client_needs_not_know_who_has_the_jobs(doors: tuple[Door, Door]) -> None:
    owner, other = doors
    batch = other.batch(prompts(25))
    other.drain(25)
    ended = other.ended(batch)
    with owner.client() as one, other.client() as second:
        assert second.batches.retrieve(batch) == one.batches.retrieve(batch)
        output = one.files.content(ended.output_file_id).read()
        assert second.files.content(ended.output_file_id).read() == output != b""
        rest = other.call("GET", f"/v1/files/{ended.output_file_id}/content", Range="bytes=100-")
        assert (rest.status, rest.content) == (206, output[100:])
        assert second.files.delete(ended.input_file_id).deleted
    assert figure(other, "generation") == figure(owner, "generation")
    assert ["spillway_gateway_jobs{" in metrics(door) for door in doors] == [True, False]


def metrics(door: Door) -> str:
    return door.call("GET", "/metrics", "monitor").content.decode()


def test_refusals_are_those_of_the_owner(doors: tuple[Door, Door]) -> None:
    for door in doors:
        answer = door.call("GET", "/v1/batches", "wrong")
        assert (answer.status, answer.code, answer.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert door.call("GET", "/v1/files", "monitor").status == 403
        assert door.call("GET", "/v1/batches/batch_0").status == 404
        assert door.call("GET", "/api/overview", "monitor").json["num_jobs"] >= 0
        page = door.call("GET", "/", None)
        assert (page.status, page.headers["x-content-type-options"]) == (200, "nosniff")
        assert len([name for name in page.headers if name == "content-security-policy"]) == 1


def test_pages_of_others_are_kept_out_at_either(doors: tuple[Door, Door]) -> None:
    for door in doors:
        assert door.call("GET", "/v1/batches", Origin="http://elsewhere").status == 403
        assert door.call("GET", "/v1/batches", Origin=f"http://127.0.0.1:{door.port}").status == 200


@pytest.mark.parametrize("target", ["@127.0.0.1:1/v1/files", "http://127.0.0.1:1/v1/files", "//127.0.0.1:1/v1/files"])
def test_a_request_cannot_name_another_host(doors: tuple[Door, Door], target: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", doors[1].port, timeout=60)
    connection.putrequest("GET", "/")
    connection._buffer[0] = f"GET {target} HTTP/1.1".encode()
    connection.putheader("Authorization", "Bearer token-of-a")
    connection.endheaders()
    assert connection.getresponse().status in (400, 404)
    connection.close()


def test_a_big_upload_passes_through_in_pieces(doors: tuple[Door, Door]) -> None:
    owner, other = doors
    row = lines({"prompt": "x" * 100_000})
    content = row * (BIG_BYTES // len(row))
    other.upload(prompts(1))  # so that everything is imported
    before = most_resident_bytes(other)
    file = other.upload(content)
    assert most_resident_bytes(other) - before < MORE_BYTES
    job = submit(other, [content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20)])
    assert most_resident_bytes(other) - before < MORE_BYTES
    assert job.input_sha256 == hashlib.sha256(content).hexdigest()
    with owner.client() as client:
        assert client.files.retrieve(file).bytes == len(content)
    call(owner, "CancelJob", batch_pb2.CancelJobRequest(name=job.name))


def call(door: Door, method: str, request: Any) -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{door.grpc_port}") as channel:
        stub: Any = batch_pb2_grpc.BatchServiceStub(channel)
        return getattr(stub, method)(request, metadata=(("authorization", "Bearer token-of-a"),), timeout=60)


def submit(door: Door, pieces: list[bytes]) -> Any:
    def messages() -> Iterator[batch_pb2.SubmitJobRequest]:
        yield batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="tiny"))
        for piece in pieces:
            yield batch_pb2.SubmitJobRequest(input=piece)

    return call(door, "SubmitJob", messages())


def refusal(door: Door) -> Answer | None:
    answer = door.call("GET", "/v1/files")
    return answer if answer.status == 503 else None


def test_a_frozen_owner_is_named_and_a_killed_one_replaced(tmp_path: Path) -> None:
    owner = Door(tmp_path, tokens=True)
    try:
        with serving(tmp_path, tokens=True) as other:
            until(lambda: other.call("GET", "/v1/files").status == 200, "the other has found the owner")
            batch = other.batch(prompts(20))
            other.drain(5)
            owner.process.send_signal(signal.SIGSTOP)
            refused = until(lambda: refusal(other), "it is told")
            assert refused.code == "handover"
            assert f"127.0.0.1:{owner.grpc_port}" in refused.json["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
            owner.process.send_signal(signal.SIGCONT)
            until(lambda: other.call("GET", "/v1/files").status == 200, "it answers again")
            owner.process.kill()
            with other.client(max_retries=2) as client:
                assert client.batches.retrieve(batch).status in ("validating", "in_progress")
            assert (owns(other), figure(other, "generation")) == (1, 2)
            other.drain(15)
            assert other.ended(batch).request_counts.total == 20
    finally:
        owner.process.kill()
        owner.process.communicate()
