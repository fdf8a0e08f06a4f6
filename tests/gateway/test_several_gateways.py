"""Several gateways over one data directory: one has the jobs, the others pass calls on, and take its place."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from batch_files import requests
from certificates import Authority
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from service_clients import Client, State, connected, refused

from spillway.api.batch.v1 import batch_pb2
from spillway.api.client import target
from spillway.api.client.batch import BatchClient
from spillway.api.errors import DirectoryLostError, JobLockedError
from spillway.api.worker.v1 import worker_pb2
from spillway.gateway.service.access import Access, Kind
from spillway.gateway.service.claim import Claim, Owner, house_token
from spillway.gateway.service.coordinator import Coordinator, Peers, ServiceConfig
from spillway.gateway.service.job_trace import Report
from spillway.gateway.service.server import Gateway, Tls, gateway
from spillway.gateway.service.spec import JobRequest

LINES = requests(10)
INPUT = b"\n".join(LINES)


def run(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    def wrapped(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 120))

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


class Pair:
    """Two gateways over one directory: `first` has the jobs until it is stopped or loses them."""

    first: Gateway
    second: Gateway

    def __init__(self) -> None:
        self.of_first = contextlib.AsyncExitStack()

    @property
    def both(self) -> str:
        return f"127.0.0.1:{self.first.port},127.0.0.1:{self.second.port}"


@contextlib.asynccontextmanager
async def pair(data: Path, *others: Any) -> AsyncIterator[Pair]:
    """`others`: what else `gateway` takes."""
    made, config = Pair(), ServiceConfig(data)
    async with made.of_first:
        made.first = await made.of_first.enter_async_context(gateway(config, "127.0.0.1:0", *others))
        async with gateway(config, "127.0.0.1:0", *others) as made.second:
            await until(lambda: made.second.ownership.usable)
            assert (made.first.ownership.owns, made.second.ownership.owns) == (True, False)
            yield made


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.02)


@run
async def test_a_client_of_either_sees_the_same(tmp_path: Path) -> None:
    """Every call of clients and agents, through the gateway that does not have the jobs."""
    async with pair(tmp_path) as both, connected(both.first.port) as one, connected(both.second.port) as other:
        job = await other.submit(INPUT, request_id="r", display_name="through the other")
        assert (await one.submit(INPUT, request_id="r", display_name="through the other")).name == job.name
        assert [each.name for each in (await other.batch.ListJobs(batch_pb2.ListJobsRequest())).jobs] == [job.name]
        await other.until(job.name, State.RUNNING)
        leased = await other.lease(4)
        assert not (await other.worker.Renew(worker_pb2.RenewRequest(leases=[leased.lease]))).lost_leases
        assert (await one.get(job.name)).lines.leased == 4
        assert (await other.complete(leased)).accepted == 4
        rows, cursor = await other.rows(job.name)
        following = asyncio.create_task(other.rows(job.name, cursor, follow=True))
        assert await one.work() == 6
        rows += (await following)[0]
        assert sorted(row.index for row in rows) == list(range(10))
        final = await other.until(job.name)
        assert (final.state, final.lines.completed) == (State.COMPLETED, 10)
        assert await other.file(job.name) == await one.file(job.name) != b""
        await other.batch.DeleteJob(batch_pb2.DeleteJobRequest(name=job.name))
        for client in (one, other):
            with refused() as refusal:  # with the details of the one that has the jobs
                await client.get(job.name)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")


@run
async def test_the_other_goes_on_when_one_stops(tmp_path: Path) -> None:
    async with pair(tmp_path) as both, connected(both.second.port) as client:
        name = (await client.submit(INPUT)).name
        leased = await client.lease(4)
        stopping = asyncio.create_task(both.of_first.aclose())
        await until(lambda: both.second.ownership.owns)
        await stopping
        assert both.second.ownership.generation == 2
        await client.until(name, State.RUNNING)
        assert (await client.complete(leased)).accepted == 4  # under a lease of the former owner
        assert await client.work() == 6
        assert (await client.until(name)).lines.completed == 10


@run
async def test_clients_that_know_both_notice_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(INPUT)
    async with pair(tmp_path / "data") as both, BatchClient(target.Target(both.both)) as client:
        job = await client.submit(batch_pb2.Job(model="m"), source)
        watched = [asyncio.create_task(seen(client, job.name)) for _ in range(3)]
        await both.of_first.aclose()
        async with connected(both.second.port) as worker:
            while not await worker.work():
                await asyncio.sleep(0.02)
        for states in await asyncio.gather(*watched):
            assert states[-1] == State.COMPLETED
        assert len(b"".join([piece async for piece in client.download(job.name, batch_pb2.ReadFileRequest.OUTPUT)]))


async def seen(client: BatchClient, name: str) -> list[int]:
    return [job.state async for job in client.watch(name)]


@run
async def test_deadline_and_cancellation_go_along(tmp_path: Path) -> None:
    ended: list[tuple[str, str]] = []

    class Observer:
        def answered(self, method: str, code: str, seconds: float) -> None:
            ended.append((method, code))

        def streamed(self, method: str, code: str) -> None:
            ended.append((method, code))

    async with pair(tmp_path, None, None, Observer()) as both, connected(both.second.port) as client:
        name = (await client.submit(INPUT)).name
        lease = worker_pb2.LeaseRequest(worker="w", model="nobody's", max_lines=1, wait={"seconds": 30})
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.worker.Lease(lease, timeout=0.3)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        watch = client.batch.WatchJob(batch_pb2.WatchJobRequest(name=name))
        assert (await watch.read()).job.name == name
        watch.cancel()
        await until(lambda: ("WatchJob", "CANCELLED") in ended and ("Lease", "CANCELLED") in ended)


@run
async def test_who_calls_is_decided_by_the_one_that_has_the_jobs(tmp_path: Path) -> None:
    """Over TLS with client certificates: gateways show each other their own, and tokens go along."""
    authority, tokens = Authority(tmp_path), tmp_path / "tokens"
    tokens.write_text("".join(f"{hashlib.sha256(each.encode()).hexdigest()} {each} client\n" for each in ("a", "b")))
    served, mine = authority.certify("served"), authority.certify("mine")
    tls = Tls(served.certificate, served.key, authority.certificate)
    config = ServiceConfig(tmp_path / "data", peers=Peers(authority=authority.certificate))
    access = Access.load(tokens)
    other_access = Access.load(tokens)
    house = house_token(config.data)
    access.trust(house, Kind.AGENT)
    secure = target.Tls(authority.certificate, mine.certificate, mine.key)
    socket = tmp_path / "socket"
    async with (
        gateway(config, "127.0.0.1:0", access, tls) as one,
        gateway(config, "127.0.0.1:0", other_access, tls, None, socket) as other,
    ):
        for token in ("a", "b", house):
            (tmp_path / token).write_text(token)
        where = target.Target(f"127.0.0.1:{other.port}", secure, tmp_path / "a")
        any_of_both = target.Target(f"localhost:{one.port},{where.address}", secure, tmp_path / "b")
        async with BatchClient(where) as a, BatchClient(any_of_both) as b:
            job = await a.submit(batch_pb2.Job(model="m"), INPUT)
            assert [each.name async for each in a.jobs()] == [job.name]
            assert not [each async for each in b.jobs()]
        local = target.Target(f"unix:{socket}", None, tmp_path / house)
        agent = Client(local.channel())  # the agent of the house of one is known to the other
        request = worker_pb2.LeaseRequest(worker="w", model="m", max_lines=1, wait={"seconds": 20})
        assert (await agent.worker.Lease(request, metadata=local.metadata())).lines
        with refused() as refusal:
            await agent.worker.Lease(request)
        assert refusal.reason == "UNAUTHENTICATED"
        await agent.channel.close()
        stranger = target.Target(where.address, target.Tls(authority.certificate), tmp_path / "a")
        async with BatchClient(stranger, patience_s=0.2) as client:
            with pytest.raises(Exception, match="cannot be used"):
                await client.get(job.name)


async def finished(call: Any) -> Any:
    await call.done_writing()
    return await call


@run
async def test_an_upload_that_breaks_off_makes_no_job(tmp_path: Path) -> None:
    """Its caller gone, or the gateway that has the jobs. Repeated under its request id, there is one, a whole one."""
    async with pair(tmp_path) as both, connected(both.second.port) as client:
        for number in range(10):
            async with connected(both.second.port) as leaving:
                call = leaving.batch.SubmitJob()
                await call.write(batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"), request_id=f"r{number}"))
                await call.write(batch_pb2.SubmitJobRequest(input=LINES[0] + b"\n"))
                if number % 2:
                    call.cancel()
        assert not (await client.batch.ListJobs(batch_pb2.ListJobsRequest())).jobs
        call = client.batch.SubmitJob()
        await call.write(batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"), request_id="r0"))
        await call.write(batch_pb2.SubmitJobRequest(input=LINES[0] + b"\n"))
        await both.of_first.aclose()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await finished(call)
        assert raised.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        for _ in range(2):
            assert (await client.submit(INPUT, request_id="r0")).input_bytes == len(INPUT)
        assert len((await client.batch.ListJobs(batch_pb2.ListJobsRequest())).jobs) == 1


@run
async def test_an_owner_that_lost_the_directory_stops(tmp_path: Path) -> None:
    """Somebody removed the lock file, so that another gateway could take the directory."""
    async with pair(tmp_path) as both, connected(both.first.port) as one, connected(both.second.port) as other:
        name = (await one.submit(INPUT)).name
        (tmp_path / "lock").unlink()
        await until(lambda: not both.first.ownership.owns)
        await until(lambda: both.first.ownership.usable and both.second.ownership.usable)
        assert both.first.ownership.owns is not both.second.ownership.owns
        await one.until(name, State.RUNNING)
        assert await one.work(2) == 10
        assert (await one.until(name)).lines.completed == (await other.get(name)).lines.completed == 10


@run
async def test_nothing_is_sealed_without_the_directory(tmp_path: Path) -> None:
    claim = Claim(tmp_path)
    coordinator = Coordinator(ServiceConfig(tmp_path), claim)
    await coordinator.start()
    upload = coordinator.upload()
    upload.write(INPUT)
    job = await coordinator.submit("t", JobRequest(model="m"), upload)
    grant = await coordinator.lease("w", "m", 100, 20)
    assert grant is not None
    (tmp_path / "lock").unlink()
    Claim(tmp_path).release()
    body = b'{"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
    results = [(line.index, body) for line, _ in grant.lines]
    assert coordinator.complete(job.spec.id, results, Report(grant.lease.id)) == 10
    while not job.trouble:
        await job.changed.wait()
    assert not job.folder.paths.output.exists()
    await coordinator.stop()
    claim.release()


def test_a_claim_knows_when_it_is_lost(tmp_path: Path) -> None:
    claim = Claim(tmp_path)
    claim.check()
    with pytest.raises(JobLockedError):
        Claim(tmp_path)
    (tmp_path / "lock").unlink()
    with pytest.raises(DirectoryLostError, match="lock"):
        claim.check()
    theirs = Claim(tmp_path)
    assert theirs.owner.generation == claim.owner.generation + 1
    with pytest.raises(DirectoryLostError):
        claim.check()
    (tmp_path / "owner.json").write_bytes(b"torn")
    with pytest.raises(DirectoryLostError, match="whose"):
        theirs.check()
    theirs.release()
    assert Claim(tmp_path).owner.generation == 1  # a torn file is nobody's


def test_a_killed_owner_leaves_the_directory_to_the_next(tmp_path: Path) -> None:
    """Also while a child of it lives on, which must not have inherited the lock."""
    program = (
        "import subprocess, time; from pathlib import Path; from spillway.gateway.service.claim import Claim; "
        f"held = Claim(Path({str(tmp_path)!r})); child = subprocess.Popen(['sleep', '60']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        with pytest.raises(JobLockedError):
            Claim(tmp_path)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        try:
            found = Owner.read(tmp_path)
            claim = Claim(tmp_path)
            assert found is not None
            assert claim.owner.generation == found.generation + 1
            claim.release()
        finally:
            subprocess.run(["kill", str(child)], check=True)


@run
async def test_while_nobody_answers_a_call_is_told_to_come_back(tmp_path: Path) -> None:
    held = Claim(tmp_path)  # by somebody who says not where
    async with gateway(ServiceConfig(tmp_path), "127.0.0.1:0") as served, connected(served.port) as client:
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        for service, status in (
            ("", health_pb2.HealthCheckResponse.SERVING),
            ("spillway.batch.v1.BatchService", health_pb2.HealthCheckResponse.NOT_SERVING),
        ):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == status
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.get("jobs/0")
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        found = rpc_status.from_call(raised.value)
        assert found is not None
        info, wait = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert found.details[0].Unpack(info)
        assert found.details[1].Unpack(wait)
        assert info.reason == "HANDOVER"
        assert wait.retry_delay.ToMilliseconds() > 0
        waiting = asyncio.create_task(client.submit(INPUT))
        await asyncio.sleep(0.1)
        held.release()
        assert (await waiting).input_bytes == len(INPUT)


def test_the_token_of_the_house_is_one_and_private(tmp_path: Path) -> None:
    token = house_token(tmp_path)
    assert house_token(tmp_path) == token
    assert (tmp_path / "house-token").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["house-token"]
