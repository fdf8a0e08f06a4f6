"""The batch service over real sockets: jobs in, lines out to workers, results back, each line once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
from batch_files import request, requests
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from service_clients import State, refused, serving

from spillway.api.batch.v1 import batch_pb2
from spillway.api.worker.v1 import worker_pb2
from spillway.gateway.service.leases import LeaseRules

INPUT = b"\n".join([*requests(10), b"{"])


def run(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Runs an async test in a loop of its own."""

    def wrapped(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 120))

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


@run
async def test_a_batch_from_submission_to_deletion(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        job = await client.submit(INPUT, display_name="d", labels={"k": "v"}, priority=3)
        assert (job.display_name, dict(job.labels), job.priority, job.input_bytes) == ("d", {"k": "v"}, 3, len(INPUT))
        running = await client.until(job.name, State.RUNNING)
        assert (running.lines.total, running.lines.pending, running.lines.failed) == (11, 10, 1)
        assert running.lines.failed_by_code == {"invalid_json": 1}
        leased = await client.lease(4)
        assert [line.index for line in leased.lines] == [0, 3, 6, 9]  # they share a prefix
        assert leased.lines[1].request == requests(10)[3]
        assert (await client.get(job.name)).lines.leased == 4
        done = await client.complete(leased)
        assert (done.accepted, done.ignored) == (4, 0)
        assert await client.work() == 6
        final = await client.until(job.name)
        assert (final.state, final.lines.completed, final.lines.failed) == (State.COMPLETED, 10, 1)
        assert final.HasField("end_time")
        output = (await client.file(job.name)).splitlines(keepends=True)
        assert len(output) == 10
        assert all(b'"r%d"' % number in row for number, row in enumerate(output))
        errors = await client.file(job.name, batch_pb2.ReadFileRequest.ERRORS)
        assert b'"invalid_json"' in errors
        assert await client.file(job.name, offset=len(output[0])) == b"".join(output[1:])
        rows, _ = await client.rows(job.name)
        assert sorted((row.index, row.json) for row in rows if not row.is_error) == list(enumerate(output))
        assert [row.json for row in rows if row.is_error] == [errors]
        await client.batch.DeleteJob(batch_pb2.DeleteJobRequest(name=job.name))
        with refused() as refusal:
            await client.get(job.name)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
        assert list((tmp_path / "jobs").iterdir()) == []


@run
async def test_submitting_again_is_safe(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        first = await client.submit(INPUT, request_id="one")
        assert (await client.submit(INPUT, request_id="one", piece=7)).name == first.name
        assert (await client.submit(INPUT)).name != first.name
        for other in ({"content": INPUT + b"\n"}, {"content": INPUT, "model": "other"}):
            with refused() as refusal:
                await client.submit(**other, request_id="one")
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    async with serving(tmp_path) as client:
        assert (await client.submit(INPUT, request_id="one")).name == first.name
    assert list((tmp_path / "incoming").iterdir()) == []


@run
async def test_what_cannot_be_a_job_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, max_input_bytes=100) as client:
        for job in ({"model": ""}, {"display_name": "x" * 201}, {"priority": 101}, {"labels": {"": "x"}}):
            with refused() as refusal:
                await client.submit(b"{}", **job)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        with refused() as refusal:
            await client.submit(b"x" * 101)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "INPUT_TOO_LARGE")
        for messages in (
            [],
            [batch_pb2.SubmitJobRequest(input=b"{}")],
            [batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"))] * 2,
        ):
            with refused() as refusal:
                await client.batch.SubmitJob(iter(messages))
            assert refusal.reason == "INVALID_ARGUMENT"
        listed = await client.batch.ListJobs(batch_pb2.ListJobsRequest())
        assert not listed.jobs
    assert list((tmp_path / "incoming").iterdir()) == []


@run
async def test_an_upload_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        call = client.batch.SubmitJob()
        await call.write(batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"), input=b"{}"))
        while not list((tmp_path / "incoming").glob("*/input.jsonl")):
            await asyncio.sleep(0.01)
        call.cancel()
        while list((tmp_path / "incoming").iterdir()):
            await asyncio.sleep(0.01)
    assert list((tmp_path / "jobs").iterdir()) == []


@run
async def test_an_input_without_lines_fails_as_a_whole(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        job = await client.until((await client.submit(b"\n\n")).name)
        assert job.state == State.FAILED
        assert "no request line" in job.error.message
        assert job.lines.total == 0


@run
async def test_an_input_of_bad_lines_completes_with_errors(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        job = await client.until((await client.submit(b"{\n}")).name)
        assert (job.state, job.lines.failed) == (State.COMPLETED, 2)
        assert await client.file(job.name) == b""


@run
async def test_cancelling_keeps_what_is_done(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        name = (await client.submit(INPUT)).name
        await client.complete(await client.lease(4))
        held = await client.lease(3)
        await client.batch.CancelJob(batch_pb2.CancelJobRequest(name=name))
        renewed = await client.worker.Renew(worker_pb2.RenewRequest(leases=[held.lease]))
        assert list(renewed.lost_leases) == [held.lease]
        job = await client.until(name)
        assert (job.state, job.lines.completed) == (State.CANCELLED, 4)
        assert job.lines.failed_by_code == {"invalid_json": 1, "cancelled": 6}
        late = await client.complete(held)
        assert (late.accepted, late.ignored) == (0, 3)
        assert len((await client.file(name)).splitlines()) == 4
        assert not (await client.lease(1, wait_s=0)).lines
        again = await client.batch.CancelJob(batch_pb2.CancelJobRequest(name=name))
        assert again.state == State.CANCELLED
        with refused() as refusal:
            await client.batch.PauseJob(batch_pb2.PauseJobRequest(name=name))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_FINAL")


@run
async def test_a_paused_job_hands_out_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        name = (await client.submit(INPUT)).name
        held = await client.lease(1)
        assert (await client.batch.PauseJob(batch_pb2.PauseJobRequest(name=name))).state == State.PAUSED
        assert not (await client.lease(1, wait_s=0)).lines
        assert (await client.complete(held)).accepted == 1  # what runs is finished
        waiting = asyncio.create_task(client.lease(1))
        await asyncio.sleep(0.1)
        assert (await client.batch.ResumeJob(batch_pb2.ResumeJobRequest(name=name))).state == State.RUNNING
        assert (await waiting).lines


@run
async def test_higher_priority_first_then_older_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        names = {}
        for label, priority in (("old", 0), ("urgent", 5), ("young", 0), ("idle", -5)):
            names[(await client.submit(request(label), priority=priority)).name] = label
        for name in names:
            await client.until(name, State.RUNNING)
        assert [names[(await client.lease(10)).lines[0].job] for _ in names] == ["urgent", "old", "young", "idle"]


@run
async def test_lines_go_only_to_agents_of_their_model(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        job = await client.until((await client.submit(INPUT, model="llama")).name, State.RUNNING)
        assert "no agent has asked for lines of model 'llama'" in job.waiting_reason
        assert not (await client.lease(1, wait_s=0, model="m")).lines
        leased = await client.lease(1, wait_s=0, model="llama")
        assert leased.lines
        assert (await client.get(job.name)).waiting_reason == ""
        await client.worker.Return(worker_pb2.ReturnRequest(leases=[leased.lease]))
        assert "busy" in (await client.get(job.name)).waiting_reason


@run
async def test_a_deadline_ends_a_job(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        deadline = batch_pb2.Job(deadline={"seconds": int(time.time()) + 1}).deadline
        name = (await client.submit(INPUT, deadline=deadline)).name
        await client.complete(await client.lease(4))
        job = await client.until(name)
        assert job.state == State.EXPIRED
        assert job.lines.completed + job.lines.failed_by_code["expired"] == 10


@run
async def test_lines_of_a_lost_worker_go_to_another_and_are_given_up_in_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path, rules=LeaseRules(ttl_s=0.2, max_attempts=2)) as client:
        name = (await client.submit(b"\n".join(requests(2)))).name
        first = await client.lease(1)
        second = await client.lease(1)
        await client.complete(second)
        again = await client.lease(5)
        assert [(line.index, line.attempt) for line in again.lines] == [(first.lines[0].index, 2)]
        job = await client.until(name)
        assert job.lines.failed_by_code == {"internal_error": 1}
        errors = await client.file(name, batch_pb2.ReadFileRequest.ERRORS)
        assert b"given up after 2 attempts: w: lease ran out; w: lease ran out" in errors


@run
async def test_failures_come_back_or_stay(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        name = (await client.submit(b"\n".join(requests(2)))).name
        leased = await client.lease(2)
        failures = [
            {"index": 0, "code": "context_length_exceeded", "message": "too long", "param": "prompt"},
            {"index": 1, "code": "internal_error", "message": "out of luck", "retryable": True},
        ]
        failing = worker_pb2.FailRequest(job=name, lease=leased.lease, failures=failures)
        assert (await client.worker.Fail(failing)).accepted == 2
        assert (await client.worker.Fail(failing)).ignored == 2
        again = await client.lease(5)
        assert [(line.index, line.attempt) for line in again.lines] == [(1, 2)]
        await client.complete(again)
        job = await client.until(name)
        assert (job.lines.completed, job.lines.failed_by_code) == (1, {"context_length_exceeded": 1})
        assert b'"too long","param":"prompt","line":1' in await client.file(name, batch_pb2.ReadFileRequest.ERRORS)


@run
async def test_bad_results_are_refused_whole(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        name = (await client.submit(INPUT)).name
        leased = await client.lease(2)
        good = worker_pb2.CompleteRequest.Result(index=leased.lines[0].index, body=b"{}")
        for index, body in (
            (0, b"{"),
            (0, b"[]"),
            (0, b"{\n}"),
            (0, b"\xff"),
            (0, b"[" * 10**5),
            (11, b"{}"),
            (-1, b"{}"),
        ):
            bad = worker_pb2.CompleteRequest.Result(index=index, body=body)
            with refused() as refusal:
                await client.worker.Complete(
                    worker_pb2.CompleteRequest(job=name, lease=leased.lease, results=[good, bad])
                )
            assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
        with refused() as refusal:
            await client.worker.Fail(worker_pb2.FailRequest(job=name, failures=[{"index": 0, "code": "nonsense"}]))
        assert (await client.get(name)).lines.completed == 0


@run
async def test_results_can_be_followed_over_restarts(tmp_path: Path) -> None:
    """Each row once, whenever the reader or the gateway was away."""
    async with serving(tmp_path) as client:
        name = (await client.submit(INPUT)).name
        await client.complete(await client.lease(3))
        following = asyncio.create_task(client.rows(name, follow=True))
        await client.complete(await client.lease(2))
        await asyncio.sleep(0.1)
        following.cancel()
        rows, cursor = await client.rows(name)
    async with serving(tmp_path) as client:
        more, cursor = await client.rows(name, cursor)
        rows += more
        following = asyncio.create_task(client.rows(name, cursor, follow=True))
        await client.until(name, State.RUNNING)
        await client.work()
        more, cursor = await following
        rows += more
        assert await client.rows(name, cursor) == ([], cursor)
        output = await client.file(name)
    async with serving(tmp_path) as client:
        assert await client.rows(name, cursor) == ([], cursor)
        assert len((await client.rows(name))[0]) == 11
        with refused() as refusal:
            await client.rows(name, "12-34")
        assert refusal.reason == "INVALID_ARGUMENT"
    assert sorted(row.index for row in rows) == list(range(11))
    assert b"".join(row.json for row in sorted(rows, key=lambda row: row.index) if not row.is_error) == output


@run
async def test_pages_of_jobs(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        names = []
        for number in range(5):
            names.append((await client.submit(request(str(number)))).name)
            await asyncio.sleep(0.002)
        seen, token = [], ""
        while True:
            page = await client.batch.ListJobs(batch_pb2.ListJobsRequest(page_size=2, page_token=token))
            assert len(page.jobs) <= 2
            seen += [job.name for job in page.jobs]
            token = page.next_page_token
            if not token:
                break
        assert seen == names[::-1]


@run
async def test_states_that_forbid_a_call(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        name = (await client.submit(INPUT)).name
        for call in (client.file(name), client.batch.DeleteJob(batch_pb2.DeleteJobRequest(name=name))):
            with refused() as refusal:
                await call
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_FINAL")
        await client.lease(1)
        await client.work()
        for bad in ("", "jobs/", "jobs/../x", "job/1", "jobs/XYZ", name + "/"):
            with refused() as refusal:
                await client.get(bad)
            assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT


@run
async def test_health_and_reflection(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        for service in ("", "spillway.batch.v1.BatchService", "spillway.worker.v1.WorkerService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        asking = [reflection_pb2.ServerReflectionRequest(list_services="")]
        async for answer in reflection.ServerReflectionInfo(iter(asking)):
            names = {service.name for service in answer.list_services_response.service}
        assert {"spillway.batch.v1.BatchService", "spillway.worker.v1.WorkerService"} < names
