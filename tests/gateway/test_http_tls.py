"""The HTTP door speaks TLS as gRPC does, and lets in certificates of a client authority only."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from certificates import Authority, Pair

from spillway.gateway.http.door import DoorConfig, door
from spillway.gateway.http.metrics import GatewayMetrics
from spillway.gateway.service.access import Access
from spillway.gateway.service.coordinator import Peers, ServiceConfig
from spillway.gateway.service.server import Tls, gateway


@contextlib.asynccontextmanager
async def behind(tls: Tls, folder: Path) -> AsyncIterator[int]:
    async with gateway(ServiceConfig(folder / "data"), "127.0.0.1:0", None, tls) as served:
        config = DoorConfig("127.0.0.1:0", Access(), tls)
        async with door(config, served.ownership, GatewayMetrics()) as port:
            yield port


async def healthy(port: int, authority: Authority, pair: Pair | None = None) -> bool:
    trusted = ssl.create_default_context(cafile=str(authority.certificate))
    if pair is not None:
        trusted.load_cert_chain(pair.certificate, pair.key)
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(f"https://localhost:{port}/healthz", ssl=trusted) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False


def test_who_gets_in_over_tls(tmp_path: Path) -> None:
    async def check() -> None:
        authority, other = Authority(tmp_path), Authority(tmp_path, "other")
        server, known, unknown = authority.certify("server"), authority.certify("known"), other.certify("unknown")
        async with behind(Tls(server.certificate, server.key), tmp_path) as port:
            assert await healthy(port, authority)
            assert not await healthy(port, other)
        async with behind(Tls(server.certificate, server.key, authority.certificate), tmp_path) as port:
            assert await healthy(port, authority, known)
            assert not await healthy(port, authority, unknown)
            assert not await healthy(port, authority)

    asyncio.run(asyncio.wait_for(check(), 120))


@pytest.mark.parametrize("address", ["127.0.0.1:x", "127.0.0.1:99999999"])
def test_an_address_that_cannot_be_listened_on_is_an_os_error(tmp_path: Path, address: str) -> None:
    async def check() -> None:
        async with gateway(ServiceConfig(tmp_path / "data"), "127.0.0.1:0") as served:
            with pytest.raises(OSError, match="cannot listen"):
                async with door(DoorConfig(address, Access()), served.ownership, GatewayMetrics()):
                    pass

    asyncio.run(asyncio.wait_for(check(), 120))


def test_what_another_gateway_answers_goes_by_tls_too(tmp_path: Path) -> None:
    """Each shows its certificate to the other, under the name that certificates say."""

    async def check() -> None:
        authority = Authority(tmp_path)
        served, known = authority.certify("served"), authority.certify("known")
        tls = Tls(served.certificate, served.key, authority.certificate)
        service = ServiceConfig(tmp_path / "data", peers=Peers(None, authority.certificate, "localhost"))
        where, trusted = (
            DoorConfig("127.0.0.1:0", Access(), tls),
            ssl.create_default_context(cafile=authority.certificate),
        )
        trusted.load_cert_chain(known.certificate, known.key)
        async with contextlib.AsyncExitStack() as stack:
            owner = await stack.enter_async_context(gateway(service, "127.0.0.1:0", None, tls))
            other = await stack.enter_async_context(gateway(service, "127.0.0.1:0", None, tls))
            port = await stack.enter_async_context(door(where, other.ownership, GatewayMetrics()))
            session = await stack.enter_async_context(aiohttp.ClientSession())

            async def ask() -> tuple[int, str]:
                async with session.get(f"https://localhost:{port}/v1/models", ssl=trusted) as answer:
                    return answer.status, await answer.text()

            status, text = await ask()
            assert (status, "serves no HTTP" in text) == (503, True)
            await stack.enter_async_context(door(where, owner.ownership, GatewayMetrics()))
            while (await ask())[0] == 503:
                await asyncio.sleep(0.05)
            assert await ask() == (200, '{"object":"list","data":[]}')
            assert not other.ownership.owns

    asyncio.run(asyncio.wait_for(check(), 120))
