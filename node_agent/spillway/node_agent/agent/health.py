"""`/healthz`, `/readyz`, `/metrics` over HTTP, in a thread of their own, so that they answer while a model loads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest

from spillway.api.errors import SpillwayError


class HealthAddressError(SpillwayError):
    """The address cannot be listened on."""


class Health(Protocol):
    """What the agent says of itself; an empty text means well."""

    def sick(self) -> str:
        """Why the process should be restarted."""

    def unready(self) -> str:
        """Why it can take no lines now."""


class HealthServer:
    """Listens from the start until `close`."""

    def __init__(self, address: str, health: Health, registry: CollectorRegistry) -> None:
        """`address` is "host:port", port 0 for any free one. Raises HealthAddressError."""
        host, _, port = address.rpartition(":")
        pages: dict[str, Callable[[], tuple[int, bytes]]] = {
            "/healthz": lambda: _verdict(health.sick()),
            "/readyz": lambda: _verdict(health.unready()),
            "/metrics": lambda: (200, generate_latest(registry)),
        }
        try:
            self._server = ThreadingHTTPServer((host.strip("[]"), int(port)), _handler(pages))
        except (OSError, ValueError, OverflowError) as error:
            raise HealthAddressError(f"cannot listen on {address!r}: {error}", "Write it as HOST:PORT.") from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="spillway-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _verdict(trouble: str) -> tuple[int, bytes]:
    return (503, f"{trouble}\n".encode()) if trouble else (200, b"ok\n")


def _handler(pages: dict[str, Callable[[], tuple[int, bytes]]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a caller that says nothing holds a thread no longer

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            status, body = page() if page is not None else (404, b"there are /healthz, /readyz and /metrics\n")
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Probes come every few seconds; nobody reads of them."""

    return Handler
