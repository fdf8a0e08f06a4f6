"""The gateway's gRPC server: both services, health and reflection, on one port."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc
from spillway.gateway.service.access import Access
from spillway.gateway.service.batch_servicer import BatchServicer
from spillway.gateway.service.coordinator import Coordinator, ServiceConfig
from spillway.gateway.service.refusals import Observer, RefusalInterceptor, Watch
from spillway.gateway.service.worker_servicer import WorkerServicer

MAX_MESSAGE_BYTES = 64 << 20
"""A lease of long lines and their results must fit; inputs are streamed in pieces of any size below it."""
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

    def __init__(self, server: grpc.aio.Server, port: int, coordinator: Coordinator) -> None:
        self.server, self.port, self.coordinator = server, port, coordinator


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

    Without `access` and `tls` it asks for no tokens and speaks plain text: for loopback only. `local` is a Unix socket
    where it serves, too, in plain text and with the same tokens: the folder says who gets there. Raises JobError if the
    data directory cannot be used, OSError if the address or a file of `tls` cannot.
    """
    coordinator = Coordinator(config)
    server = grpc.aio.server(
        interceptors=[RefusalInterceptor(Watch(access or Access(), coordinator.admit, observer))],
        options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
    )
    batch_pb2_grpc.add_BatchServiceServicer_to_server(BatchServicer(coordinator), server)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(coordinator), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.credentials())
        if local is not None:
            server.add_insecure_port(f"unix:{local}")
    except (RuntimeError, OSError) as error:
        await coordinator.stop()
        raise OSError(f"cannot listen on {address}: {error}") from error
    await coordinator.start()
    await server.start()
    for service in ("", *_SERVICES):
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield Gateway(server, port, coordinator)
    finally:
        await healthy.enter_graceful_shutdown()
        await server.stop(grace=1)
        await coordinator.stop()
