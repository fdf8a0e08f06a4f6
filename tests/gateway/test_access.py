"""Who gets in, and what they see: tokens, kinds of callers, tenants, TLS with and without client certificates."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from batch_files import requests
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_clients import Client, State, refused

from spillway.api.batch.v1 import batch_pb2
from spillway.api.client import target
from spillway.api.client.batch import BatchClient
from spillway.api.client.errors import RefusedError, UnreachableError
from spillway.api.worker.v1 import worker_pb2
from spillway.gateway.service.access import Access, TokenFileError
from spillway.gateway.service.coordinator import ServiceConfig
from spillway.gateway.service.errors import UnauthenticatedError
from spillway.gateway.service.server import Tls, gateway

INPUT = b"\n".join(requests(4))
TOKENS = {"token-of-a": "a client", "token-of-b": "b client", "token-of-an-agent": "cluster agent"}


def run(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    def wrapped(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), 120))

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


def token_file(folder: Path) -> Path:
    path = folder / "tokens"
    lines = [f"{hashlib.sha256(token.encode()).hexdigest()} {who}" for token, who in TOKENS.items()]
    path.write_text("# who may call\n\n" + "\n".join(lines) + "  # the last\n")
    return path


@contextlib.asynccontextmanager
async def behind_tls(folder: Path) -> AsyncIterator[Callable[[str | None], Client]]:
    """A gateway with tokens and TLS; makes clients by their token."""
    authority = Authority(folder)
    server = authority.certify("server")
    access = Access.load(token_file(folder))
    tls = Tls(server.certificate, server.key)
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(gateway(ServiceConfig(folder / "data"), "127.0.0.1:0", access, tls))
        trusted = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        channels: list[grpc.aio.Channel] = []

        def client(token: str | None) -> Client:
            credentials = trusted
            if token is not None:
                bearer = grpc.access_token_call_credentials(token)
                credentials = grpc.composite_channel_credentials(trusted, bearer)
            channels.append(grpc.aio.secure_channel(f"localhost:{served.port}", credentials))
            return Client(channels[-1])

        try:
            yield client
        finally:
            for channel in channels:
                await channel.close()


async def every_client_call(client: Client, name: str) -> AsyncIterator[Callable[[], Coroutine[Any, Any, Any]]]:
    """All calls that name a job."""
    yield lambda: client.get(name)
    for method, message in (
        ("CancelJob", batch_pb2.CancelJobRequest),
        ("PauseJob", batch_pb2.PauseJobRequest),
        ("ResumeJob", batch_pb2.ResumeJobRequest),
        ("DeleteJob", batch_pb2.DeleteJobRequest),
    ):
        call = getattr(client.batch, method)
        yield lambda call=call, message=message: _awaited(call(message(name=name)))
    yield lambda: client.until(name)
    yield lambda: client.rows(name)
    yield lambda: client.file(name)


async def _awaited(call: Any) -> Any:
    return await call


@run
async def test_nobody_gets_in_without_a_known_token(tmp_path: Path) -> None:
    async with behind_tls(tmp_path) as client:
        for token in (None, "", "wrong", hashlib.sha256(b"token-of-a").hexdigest()):
            stranger = client(token)
            calls = [call async for call in every_client_call(stranger, "jobs/0")]
            for call in (*calls, lambda c=stranger: c.submit(INPUT), lambda c=stranger: c.lease(1)):
                with refused() as refusal:
                    await call()
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
            health: Any = health_pb2_grpc.HealthStub(stranger.channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())  # probes carry no token
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


@run
async def test_anothers_job_does_not_exist(tmp_path: Path) -> None:
    async with behind_tls(tmp_path) as client:
        a, b = client("token-of-a"), client("token-of-b")
        name = (await a.submit(INPUT, request_id="same")).name
        async for call in every_client_call(b, name):
            with refused() as refusal:
                await call()
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
        listed = await b.batch.ListJobs(batch_pb2.ListJobsRequest())
        assert not listed.jobs
        other = (await b.submit(b"\n".join(requests(2)), request_id="same")).name  # names of attempts are each tenant's
        assert other != name
        assert (await a.get(name)).state in (State.VALIDATING, State.RUNNING)


@run
async def test_agents_lease_and_clients_do_not(tmp_path: Path) -> None:
    async with behind_tls(tmp_path) as client:
        a, agent = client("token-of-a"), client("token-of-an-agent")
        name = (await a.submit(INPUT)).name
        await a.until(name, State.RUNNING)
        for call in (
            lambda: a.lease(1),
            lambda: _awaited(a.worker.Renew(worker_pb2.RenewRequest(leases=["x"]))),
            lambda: _awaited(a.worker.Complete(worker_pb2.CompleteRequest(job=name))),
            lambda: _awaited(a.worker.Fail(worker_pb2.FailRequest(job=name))),
            lambda: _awaited(a.worker.Return(worker_pb2.ReturnRequest())),
            lambda: agent.get(name),
            lambda: agent.submit(INPUT),
        ):
            with refused() as refusal:
                await call()
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN")
        assert await agent.work() == 4
        assert (await a.until(name)).state == State.COMPLETED


@run
async def test_with_a_client_authority_only_its_certificates_get_in(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    server, known, unknown = authority.certify("server"), authority.certify("known"), other.certify("unknown")
    tls = Tls(server.certificate, server.key, authority.certificate)
    async with gateway(ServiceConfig(tmp_path / "data"), "127.0.0.1:0", None, tls) as served:
        for pair, gets_in in ((known, True), (unknown, False), (None, False)):
            mine = () if pair is None else (pair.key.read_bytes(), pair.certificate.read_bytes())
            credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *mine)
            async with grpc.aio.secure_channel(f"localhost:{served.port}", credentials) as channel:
                if gets_in:
                    assert not (await Client(channel).lease(1, wait_s=0)).lines
                else:
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await Client(channel).lease(1, wait_s=0)
                    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_token_file_holds_no_token_and_its_errors_show_none(tmp_path: Path) -> None:
    path = token_file(tmp_path)
    assert not any(token in path.read_text() for token in TOKENS)
    access = Access.load(path)
    assert access.caller("Bearer token-of-a").tenant == "a"
    for header in (None, "", "token-of-a", "Basic token-of-a", "Bearer", "Bearer tøken"):
        with pytest.raises(UnauthenticatedError):
            access.caller(header)
    path.write_text("a-plain-token a client\n")
    with pytest.raises(TokenFileError) as raised:
        Access.load(path)
    assert "a-plain-token" not in str(raised.value)
    with pytest.raises(TokenFileError):
        Access.load(tmp_path / "missing")


def test_a_changed_token_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = token_file(tmp_path)
    access = Access.load(path)
    path.write_text(f"{hashlib.sha256(b'a new one').hexdigest()} c client\n")
    access.refresh()
    assert access.caller("Bearer a new one").tenant == "c"
    with pytest.raises(UnauthenticatedError):
        access.caller("Bearer token-of-a")
    path.write_text("nonsense\n")
    access.refresh()
    assert access.caller("Bearer a new one").tenant == "c"
    assert "the former tokens stay in force" in caplog.text
    path.unlink()
    access.refresh()
    assert access.caller("Bearer a new one").tenant == "c"
    token_file(tmp_path)
    access.refresh()
    assert access.caller("Bearer token-of-a").tenant == "a"


@run
async def test_our_client_over_tls_with_a_certificate_and_a_token(tmp_path: Path) -> None:
    """As an agent connects, too: both go through a Target."""
    authority = Authority(tmp_path)
    server, mine = authority.certify("server"), authority.certify("mine")
    tls = Tls(server.certificate, server.key, authority.certificate)
    token, source = tmp_path / "token", tmp_path / "in.jsonl"
    token.write_text("token-of-a\n")
    source.write_bytes(INPUT)
    secure = target.Tls(authority.certificate, mine.certificate, mine.key)
    access = Access.load(token_file(tmp_path))
    async with gateway(ServiceConfig(tmp_path / "data"), "127.0.0.1:0", access, tls) as served:
        where = target.Target(f"127.0.0.1:{served.port}", secure, token, server_name="localhost")
        async with BatchClient(where) as client:
            job = await client.submit(batch_pb2.Job(model="m"), source)
            assert (await client.get(job.name)).input_bytes == len(INPUT)
            token.write_text("token-of-b\n")  # read anew with each call
            with pytest.raises(RefusedError, match="no job"):
                await client.get(job.name)
        nameless = target.Target(where.address, target.Tls(authority.certificate), token, server_name="localhost")
        async with BatchClient(nameless, patience_s=0.2) as client:
            with pytest.raises(UnreachableError):
                await client.get(job.name)
