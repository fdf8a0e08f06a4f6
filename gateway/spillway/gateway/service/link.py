"""The way from one gateway to another, the one that has the jobs, and whether that one answers."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spillway.api.client import target
from spillway.gateway.service.claim import Owner
from spillway.gateway.service.errors import Reason, ResourceError

log = logging.getLogger(__name__)

PROBE_EVERY_S = 1.0
PROBE_S = 3.0
"""An owner that takes longer to say that it is there counts as silent: frozen, or cut off."""
RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Trust:
    """How gateways over one directory know each other: with `tls` by the authority in it, which must have signed the
    certificate that each serves with; `name` is what that certificate says where it is not the host's name.

    Without `tls` they speak plain text.
    """

    tls: target.Tls | None = None
    name: str | None = None

    def channel(self, address: str) -> grpc.aio.Channel:
        """A channel to another gateway. Raises TargetError if a file of `tls` cannot be read."""
        return target.Target(address, self.tls, None, self.name).channel()

    def session(self) -> aiohttp.ClientSession:
        """For HTTP calls to another gateway. Raises TargetError."""
        connector = aiohttp.TCPConnector(limit=0, ssl=True if self.tls is None else self._context(self.tls))
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=PROBE_S),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    def _context(self, tls: target.Tls) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=tls.authority)
            if tls.certificate is not None and tls.key is not None:
                context.load_cert_chain(tls.certificate, tls.key)
        except OSError as error:  # an SSLError is one
            raise target.TargetError(f"a file of TLS between gateways cannot be used: {error}") from error
        return context


class Link:
    """Connections to the owner of the data directory. Lives in one event loop."""

    def __init__(self, owner: Owner, trust: Trust, tell: Callable[[], None]) -> None:
        """`tell` is called whenever it was found out anew whether the owner answers. Raises TargetError."""
        self.owner, self.trust, self._tell = owner, trust, tell
        self._answers = True  # until it does not
        self._connect()
        self._probing = asyncio.create_task(self._probe_forever(), name="spillway-owner-probe")

    @property
    def ready(self) -> bool:
        """Whether a call would reach the owner, as far as can be told without waiting."""
        return self._answers and self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

    def refusal(self) -> ResourceError:
        """What to tell a caller whose call cannot be passed on, or broke under way."""
        return ResourceError(
            Reason.HANDOVER,
            f"the gateway at {self.owner.grpc}, which has the jobs, does not answer",
            "Try again: another takes over once it is gone.",
            retry_s=RETRY_S,
        )

    async def close(self) -> None:
        """Ends all calls under way."""
        self._probing.cancel()
        await asyncio.gather(self._probing, return_exceptions=True)
        await self._hang_up()

    async def _probe_forever(self) -> None:
        while True:
            answered = await self._probe()
            if answered != self._answers:
                log.warning("the gateway at %s %s", self.owner.grpc, "answers again" if answered else "is silent")
            self._answers = answered
            if not answered:  # calls under way would wait for ever
                await self._redial()
            self._tell()
            await asyncio.sleep(PROBE_EVERY_S)

    async def _probe(self) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_S, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True

    def _connect(self) -> None:
        """Connections are made when they are needed."""
        self.channel, self.session = self.trust.channel(self.owner.grpc), self.trust.session()

    async def _redial(self) -> None:
        await self._hang_up()
        while True:
            try:
                self._connect()
            except target.TargetError as error:  # files of TLS may be changing under us
                log.error("no way to the gateway at %s: %s", self.owner.grpc, error)  # noqa: TRY400 — the trace says nothing
                await asyncio.sleep(PROBE_EVERY_S)
            else:
                return

    async def _hang_up(self) -> None:
        await self.channel.close()
        await self.session.close()
