"""Inputs that the gateway fetches by URI: only from where it may, stored as if they had been sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import fsspec
import grpc
import pytest
from batch_files import requests
from service_clients import State, refused, serving

from spillway.api.batch.v1 import batch_pb2
from spillway.gateway.service.errors import ForbiddenError, InvalidError
from spillway.gateway.service.fetch import InputSources

INPUT = b"\n".join(requests(10))


def test_from_memory_and_from_disk_as_if_it_had_been_sent(tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(INPUT)
    with fsspec.open("memory://store/b.jsonl", "wb") as file:
        file.write(INPUT)
    sources = InputSources((f"file://{folder}/", "memory://store/"))

    async def test() -> None:
        async with serving(tmp_path / "data", sources=sources) as client:
            sent = await client.submit(INPUT)
            for uri in (f"file://{folder}/a.jsonl", "memory://store/b.jsonl"):
                first = batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"), request_id=uri, input_uri=uri)
                names = {(await client.batch.SubmitJob(iter([first]))).name for _ in range(2)}
                (name,) = names
                assert (await client.until(name, State.RUNNING)).input_sha256 == sent.input_sha256
            for messages, reason in (
                ([{"input_uri": f"file://{folder}/none"}], "INPUT_NOT_FOUND"),
                ([{"input_uri": f"file://{tmp_path}/data/lock"}], "FORBIDDEN"),
                ([{"input_uri": f"file://{folder}/a.jsonl", "input": b"{}"}], "INVALID_ARGUMENT"),
                ([{}, {"input_uri": f"file://{folder}/a.jsonl"}], "INVALID_ARGUMENT"),
            ):
                messages[0]["job"] = batch_pb2.Job(model="m")
                with refused() as refusal:
                    await client.batch.SubmitJob(batch_pb2.SubmitJobRequest(**each) for each in messages)
                assert refusal.reason == reason
            assert list((tmp_path / "data" / "incoming").iterdir()) == []

    asyncio.run(asyncio.wait_for(test(), 60))


def test_nothing_is_fetched_unless_it_is_allowed(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as client:
            first = batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"), input_uri="file:///etc/hostname")
            with refused() as refusal:
                await client.batch.SubmitJob(iter([first]))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN")

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/batches-of-others/x",
        "s3://bucket/batches/../secret",
        "s3://other/batches/x",
        "http://bucket/batches/x",
        "simplecache::s3://bucket/batches/x",
        "file:///srv/inputs/../../etc/passwd",
        "file:///srv/inputs-of-others/x",
        "file://host/srv/inputs/x",
        "filecache::file:///srv/inputs/x",
    ],
)
def test_what_leads_out_of_the_allowed_places(uri: str) -> None:
    with pytest.raises(ForbiddenError):
        InputSources(("s3://bucket/batches", "file:///srv/inputs")).check(uri)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "inputs" / "link").symlink_to(tmp_path / "secret")
    sources = InputSources((f"file://{tmp_path}/inputs",))
    sources.check(f"file://{tmp_path}/inputs/x")
    with pytest.raises(ForbiddenError):
        sources.check(f"file://{tmp_path}/inputs/link")


@pytest.mark.parametrize("uri", ["plain", "", "a\nb://c", "s3://" + "x" * 5000])
def test_what_is_no_uri(uri: str) -> None:
    with pytest.raises(InvalidError):
        InputSources(("s3://",)).check(uri)
