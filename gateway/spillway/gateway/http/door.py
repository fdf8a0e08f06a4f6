"""The gateway's HTTP server: OpenAI's API, metrics and the page, on one port, over the same jobs as gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from spillway.gateway.http.batches import BatchRoutes
from spillway.gateway.http.files import FileRoutes
from spillway.gateway.http.guard import Guard, Handler
from spillway.gateway.http.metrics import GatewayMetrics
from spillway.gateway.http.overview import Overview
from spillway.gateway.http.refusals import error_response
from spillway.gateway.http.shelf import Shelf
from spillway.gateway.http.store import FileStore
from spillway.gateway.service.access import Access
from spillway.gateway.service.errors import ServiceError
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.server import Tls, advertised

log = logging.getLogger(__name__)
AnyHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
MAX_BODY_BYTES = 1 << 20
"""Of bodies that are not files."""
SWEEP_S = 300.0
_PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css", "/icon.svg": "icon.svg"}


@dataclass(frozen=True, slots=True)
class DoorConfig:
    """Where to listen ("host:port", port 0: any free one), who gets in, and in which tongue."""

    address: str
    access: Access
    tls: Tls | None = None


@contextlib.asynccontextmanager
async def door(config: DoorConfig, ownership: Ownership, metrics: GatewayMetrics) -> AsyncIterator[int]:
    """Serves until the block ends; yields the port. Raises OSError if the address or a file of `tls` cannot be used."""
    store = FileStore(ownership.config.data / "files")
    runner = web.AppRunner(
        application(config.access, ownership, store, metrics),
        access_log=None,
        logger=_wire_log(),
        shutdown_timeout=1.0,
        keepalive_timeout=75.0,
        auto_decompress=False,
    )
    await runner.setup()
    assert runner.server is not None
    runner.server.request_handler = _with_plain_expectations(runner.server.request_handler)
    sweeping = asyncio.create_task(_sweep_forever(store, ownership), name="spillway-file-sweeper")
    try:
        host, _, port = config.address.rpartition(":")
        context = None if config.tls is None else _context(config.tls)
        try:
            await web.TCPSite(runner, host.strip("[]"), int(port), ssl_context=context).start()
        except (ValueError, OverflowError) as error:
            raise OSError(f"cannot listen on {config.address}: {error}") from error
        bound = int(runner.addresses[0][1])
        ownership.serves_http(advertised(config.address, bound, ownership.config.peers))
        yield bound
    finally:
        sweeping.cancel()
        await runner.cleanup()
        await asyncio.gather(sweeping, return_exceptions=True)


def application(access: Access, ownership: Ownership, store: FileStore, metrics: GatewayMetrics) -> web.Application:
    """All routes behind the guard."""
    shelf = Shelf(ownership, store)
    ownership.shelves(store.contents)
    app = web.Application(middlewares=[Guard(access, ownership, metrics).answer], client_max_size=MAX_BODY_BYTES)
    FileRoutes(ownership, store, shelf).add(app.router)
    BatchRoutes(ownership, shelf).add(app.router)
    app.router.add_get("/api/overview", Overview(ownership).overview)
    metrics.watch(ownership)

    async def figures(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def healthy(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app.router.add_get("/metrics", figures)
    app.router.add_get("/healthz", healthy)
    for path, name in _PAGE_FILES.items():
        app.router.add_get(path, _static(_PAGE / name))
    return app


def _static(path: Path) -> Handler:
    async def page(_request: web.Request) -> web.StreamResponse:
        return web.FileResponse(path, headers={"Cache-Control": "no-cache"})

    return page


def _context(tls: Tls) -> ssl.SSLContext:
    """As for gRPC: with a `client_ca`, only clients with a certificate of that authority get in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _with_plain_expectations(handle: AnyHandler) -> AnyHandler:
    """The framework fails where it quotes an Expect header that is not ASCII, before any of its middlewares."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Expect", "100-continue").lower() != "100-continue":
            return error_response(417, "expectation_failed", "nothing can be expected but 100-continue")
        return await handle(request)

    return answer


def _wire_log() -> logging.Logger:
    """The framework's log, without what strangers can fill it with: what is not HTTP, and clients that left."""
    wire_log = logging.getLogger(f"{__name__}.wire")
    if not wire_log.filters:
        wire_log.addFilter(_is_ours)
    return wire_log


def _is_ours(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, ConnectionError))


async def _sweep_forever(store: FileStore, ownership: Ownership) -> None:
    while True:
        try:
            if ownership.owns:
                for sha256 in await asyncio.to_thread(store.sweep, time.time()):
                    await ownership.coordinator.unlinked(sha256)
        except (ServiceError, OSError) as error:
            log.warning("expired files could not all be removed: %s", error)
        await asyncio.sleep(SWEEP_S)
