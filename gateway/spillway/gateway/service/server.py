"""The gateway's gRPC server: both services, health and reflection, on one port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.api.client import target
from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc
from spillway.gateway.service.access import Access
from spillway.gateway.service.batch_servicer import BatchServicer
from spillway.gateway.service.coordinator import Peers, ServiceConfig
from spillway.gateway.service.link import Trust
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.refusals import Observer, RefusalInterceptor, Watch
from spillway.gateway.service.relay import RelayInterceptor
from spillway.gateway.service.worker_servicer import WorkerServicer

MAX_MESSAGE_BYTES = 64 << 20
"""A lease of long lines and their results must fit; inputs are streamed in pieces of any size below it."""
_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)]
_ANY_HOST = ("", "0.0.0.0", "[::]", "*")  # noqa: S104 — looked for, not listened on
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICES = tuple(
    file.services_by_name[name].full_name
    for file, name in ((batch_pb2.DESCRIPTOR, "BatchService"), (worker_pb2.DESCRIPTOR, "WorkerService"))
)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM. With `client_ca`, only clients with a certificate of that authority get in."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Raises OSError if a file cannot be read."""
        authority = None if self.client_ca is None else self.client_ca.read_bytes()
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


class Gateway:
    """A running gateway. Made by `gateway`; `port` is the one it listens on."""

    def __init__(self, server: grpc.aio.Server, port: int, ownership: Ownership) -> None:
        self.server, self.port, self.ownership = server, port, ownership


@contextlib.asynccontextmanager
async def gateway(
    config: ServiceConfig,
    address: str,
    access: Access | None = None,
    tls: Tls | None = None,
    observer: Observer | None = None,
    local: Path | None = None,
) -> AsyncIterator[Gateway]:
    """Serves on "host:port" (port 0: any free one) until the block ends; then finishes calls for up to a second.

    If another gateway has the data directory, calls are passed on to that one, until this one takes its place. Without
    `access` and `tls` it asks for no tokens and speaks plain text: for loopback only. `local` is a Unix socket where it
    serves, too, in plain text and with the same tokens: the folder says who gets there. Raises JobError if the data
    directory cannot be used, OSError if the address or a file of `tls` cannot, TargetError if a file of `config.peers`
    cannot.
    """
    ownership = Ownership(config, _trust(config.peers, tls))
    watch = Watch(access or Access(), ownership.admit, observer)
    server = grpc.aio.server(interceptors=[RelayInterceptor(ownership), RefusalInterceptor(watch)], options=_OPTIONS)
    batch_pb2_grpc.add_BatchServiceServicer_to_server(BatchServicer(ownership), server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(ownership), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.credentials())
        if local is not None:
            server.add_insecure_port(f"unix:{local}")
    except (RuntimeError, OSError) as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    await ownership.start(advertised(address, port, config.peers))
    await server.start()
    await _tell_health(healthy, ownership)
    telling = asyncio.create_task(_keep_telling(healthy, ownership), name="spillway-health")
    try:
        yield Gateway(server, port, ownership)
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        await healthy.enter_graceful_shutdown()
        await server.stop(grace=1)
        await ownership.stop()


def advertised(address: str, port: int, peers: Peers) -> str:
    """How other gateways reach what listens on `address`, with `port` in place of 0."""
    host = address.rpartition(":")[0]
    if peers.host is not None:
        host = peers.host
    elif host in _ANY_HOST:
        host = socket.gethostname()
    return f"{host}:{port}"


def _trust(peers: Peers, tls: Tls | None) -> Trust:
    if tls is None:
        return Trust()
    return Trust(target.Tls(peers.authority, tls.certificate, tls.key), peers.name)


async def _tell_health(healthy: health.aio.HealthServicer, ownership: Ownership) -> None:
    """The process as a whole is healthy; its services are while a call would be answered."""
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    for service in _SERVICES:
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING if ownership.usable else _NOT_SERVING)


async def _keep_telling(healthy: health.aio.HealthServicer, ownership: Ownership) -> None:
    while True:
        changed = ownership.changed
        await _tell_health(healthy, ownership)
        await changed.wait()
