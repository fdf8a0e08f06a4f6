"""`spillway serve`: the batch service on this machine, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from spillway.api.errors import SpillwayError
from spillway.api.otlp import tracing
from spillway.cli.local_agent import LocalAgent
from spillway.gateway.http.door import DoorConfig, door
from spillway.gateway.http.metrics import GatewayMetrics
from spillway.gateway.service.access import Access, Kind
from spillway.gateway.service.claim import house_token
from spillway.gateway.service.coordinator import ServiceConfig
from spillway.gateway.service.server import Tls, gateway


class ServeError(SpillwayError):
    """The service cannot be started as asked."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `spillway serve` was asked for. Addresses are "host:port"; port 0 means any free one."""

    service: ServiceConfig
    listen: str
    tokens: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    insecure: bool = field(default=False)
    http: str | None = None
    agent: LocalAgent | None = None

    def tls(self) -> Tls | None:
        """Raises ServeError unless certificate and key are given together."""
        if self.tls_cert is not None and self.tls_key is not None:
            return Tls(self.tls_cert, self.tls_key, self.tls_client_ca)
        peers = self.service.peers
        if (peers.authority, peers.name) != (None, None):
            raise ServeError("gateways trust each other by certificates where they serve TLS", "Give --tls-cert, too.")
        if (self.tls_cert, self.tls_key, self.tls_client_ca) != (None, None, None):
            raise ServeError("TLS takes a certificate and its key", "Give --tls-cert and --tls-key.")
        return None

    def check_exposure(self) -> None:
        """Raises ServeError if others on the network could get in without a token, or listen in."""
        safe = self.tls_cert is not None and self.tokens is not None
        for address in (self.listen, self.http):
            if not (safe or self.insecure or address is None or is_loopback(address)):
                raise ServeError(
                    f"{address} can be reached from other machines, and needs tokens and TLS",
                    "Give --tokens, --tls-cert and --tls-key; or --insecure if the network keeps others out.",
                )


def is_loopback(address: str) -> bool:
    """Whether "host:port" can be reached from this machine only. A name other than localhost counts as no."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is under way.

    Raises ServeError, TokenFileError, TargetError, TracesError, JobError; LocalAgentError if its own agent ends by
    itself.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options.check_exposure()
    with tracing("spillway-gateway") as traces:
        asyncio.run(_serve(replace(options, service=replace(options.service, traces=traces))))


async def _serve(options: ServeOptions) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    access = Access() if options.tokens is None else Access.load(options.tokens)
    metrics, tls = GatewayMetrics(), options.tls()
    try:
        token = house_token(options.service.data)
        access.trust(token, Kind.AGENT)
        async with contextlib.AsyncExitStack() as stack:
            local = None
            if options.agent is not None:
                local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spillway-"))) / "gateway"
            served = await stack.enter_async_context(
                gateway(options.service, options.listen, access, tls, metrics, local)
            )
            http_port = 0
            if options.http is not None:
                config = DoorConfig(options.http, access, tls)
                http_port = await stack.enter_async_context(door(config, served.ownership, metrics))
            print(f"spillway: serving on {options.listen.rpartition(':')[0]}:{served.port}", flush=True)
            if options.http is not None:
                scheme = "http" if tls is None else "https"
                print(f"spillway: {scheme}://{options.http.rpartition(':')[0]}:{http_port}", flush=True)
            if options.agent is not None and local is not None:
                await stack.enter_async_context(options.agent.running(local, token, stopped))
            await stopped.wait()
            print("spillway: stopping", flush=True)
    except OSError as error:
        raise ServeError(str(error)) from error
