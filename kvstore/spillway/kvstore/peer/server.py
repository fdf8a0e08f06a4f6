"""Serves this node's blocks to its peers.

One thread per connection, with blocking sockets: most of the time goes into system calls, copies and checksums, which
all release the interpreter lock; a block is sent from its slot by one ``sendmsg``; and a peer that does not read holds
up its own thread only, so that TCP itself is the back-pressure. The number of connections is bounded.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from ..errors import ConfigError, PeerProtocolError
from ..identity import BlockHash
from ..outcomes import MissReason
from .config import PeersConfig, split_address
from .handshake import Credentials, admit
from .orders import Orders
from .outlet import Outlet
from .sources import Found, Sources
from .wire import Get, Kind, Refusal, Stream, Verb, pack, pack_done, pack_miss, unpack_get

_log = logging.getLogger(__name__)

_HANDSHAKE_S = 5.0
_IDLE_S = 120.0
_REQUEST_S = 5.0
_BACKLOG = 64


class BlockServer:
    """A listening socket and its threads. ``address`` is where peers reach it: ``host:port`` with the real port.

    ``outcomes`` counts: ``blocks``, ``bytes``, ``by_nixl`` (blocks), ``misses``, ``bad_reports``, ``orders`` (blocks in
    them), ``connections``, ``lost`` (a peer went away or stalled within a request), ``internal``, and ``refused_…`` by
    code.
    """

    def __init__(self, config: PeersConfig, identity: bytes, sources: Sources, generation: Callable[[], int]) -> None:
        """Have the address at once, and answer after `start`.

        ``generation``: this node's, as the index knows it now; who expects another is refused.

        Raises `ConfigError` if the address cannot be had.
        """
        self._config = config
        self._identity = identity
        self._sources = sources
        self._generation = generation
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._closing = False
        host, port = split_address(config.listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {config.listen}: {error}") from error
        shown = f"[{host}]" if family is socket.AF_INET6 else host
        self.address = f"{shown}:{self._listener.getsockname()[1]}"
        self._orders: Orders | None = None
        self._acceptor = threading.Thread(target=self._accept, name="kv-peer-accept", daemon=True)

    def start(self, orders: Orders) -> None:
        """Let peers in."""
        self._orders = orders
        self._acceptor.start()

    @property
    def outcomes(self) -> dict[str, int]:
        """The counters now."""
        with self._lock:
            return dict(self._counts)

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._threads)

    def close(self, timeout_s: float) -> bool:
        """Stop, cutting every connection. Whether every thread ended in time."""
        with self._lock:
            self._closing = True
            sockets = list(self._threads.values())
            threads = [self._acceptor, *self._threads]
        for each in (self._listener, *sockets):
            _cut(each)
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._listener.close()
        return not any(thread.is_alive() for thread in threads)

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                _log.warning("a connection was not accepted: %s", error)
                time.sleep(0.05)  # out of descriptors, most likely: do not spin
                continue
            with self._lock:
                room = len(self._threads) < self._config.connections and not self._closing
                if room:
                    thread = threading.Thread(target=self._run, args=(connection,), name="kv-peer", daemon=True)
                    self._threads[thread] = connection
                    self._counts["connections"] += 1
                    thread.start()
            if not room:
                self._turn_away(connection)

    def _turn_away(self, connection: socket.socket) -> None:
        """Too many connections: say so. It waits for nothing, since a fresh connection has room for one frame."""
        self._count("refused_busy")
        try:
            connection.setblocking(False)
            connection.send(pack(Kind.REFUSED, code=Refusal.BUSY))
        except OSError as error:
            _log.debug("a peer turned away did not wait for the reason: %s", error)
        finally:
            connection.close()

    def _run(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._config.server_tls is not None:
                connection.settimeout(_HANDSHAKE_S)
                connection = self._config.server_tls.wrap_socket(connection, server_side=True)
                with self._lock:
                    self._threads[threading.current_thread()] = connection
            self._converse(Stream(connection))
        except OSError as error:
            _log.debug("a peer went away: %s", error)
            self._count("lost")
        except Exception:  # noqa: BLE001 - a defect must cost one connection, not the server
            _log.exception("a connection failed in an unforeseen way")
            self._count("internal")
        finally:
            with self._lock:
                del self._threads[threading.current_thread()]
            connection.close()

    def _converse(self, stream: Stream) -> None:
        outlet = Outlet(stream, self._config, self._sources.most_bytes)
        try:
            generation = self._generation()
            own = Credentials(self._config.token, self._identity, generation)
            admit(stream, own, time.monotonic() + _HANDSHAKE_S)
            while not self._closing and self._request(stream, outlet, generation):
                pass
        except PeerProtocolError as error:
            self._refuse(stream, Refusal(error.code or Refusal.MALFORMED))
        finally:
            outlet.close()

    def _request(self, stream: Stream, outlet: Outlet, generation: int) -> bool:
        """Answer one frame, if this node still has the ``generation`` that the peer was admitted to.

        False if the peer left, or stayed silent too long, between requests: that is no fault.
        """
        try:
            frame = stream.head((Kind.GET, Kind.BAD, Kind.ORDER, Kind.FABRIC), time.monotonic() + _IDLE_S)
        except OSError as error:
            _log.debug("a connection ends: %s", error)
            return False
        payload = stream.receive(frame.length, time.monotonic() + _REQUEST_S)
        if self._generation() != generation:
            raise PeerProtocolError("this node has a newer generation", Refusal.GENERATION)
        if frame.kind is Kind.GET:
            self._answer(stream, outlet, unpack_get(payload))
        elif frame.kind is Kind.FABRIC:
            outlet.join()
        elif frame.kind is Kind.ORDER:
            self._obey(stream, frame.code, unpack_get(payload))
        elif frame.kind is Kind.BAD:
            self._count("bad_reports")
            self._sources.recheck(BlockHash(payload))
        else:
            raise PeerProtocolError("a client has nothing to refuse")
        return True

    def _answer(self, stream: Stream, outlet: Outlet, get: Get) -> None:
        until = time.monotonic() + get.seconds
        for position, block in enumerate(get.blocks):
            if time.monotonic() >= until:
                self._miss(stream, get.request, position, MissReason.DEADLINE)
                continue
            with self._sources.find(block) as found:
                if isinstance(found, Found):
                    by_nixl = outlet.send(get.request, position, found)
                    self._count("by_nixl", by_nixl)
                    self._count("blocks")
                    self._count("bytes", found.stored.nbytes)
                else:
                    self._miss(stream, get.request, position, found)
        outlet.settle()

    def _obey(self, stream: Stream, code: int, order: Get) -> None:
        if code not in list(Verb) or self._orders is None:
            raise PeerProtocolError(f"no such order: {code}")
        results = self._orders.carry_out(Verb(code), order.blocks, time.monotonic() + order.seconds)
        self._count("orders", len(results))
        stream.send(pack_done(order.request, results), None, time.monotonic() + self._config.stall_s)

    def _miss(self, stream: Stream, request: int, position: int, reason: MissReason) -> None:
        self._count("misses")
        stream.send(pack_miss(request, position, reason), None, time.monotonic() + self._config.stall_s)

    def _refuse(self, stream: Stream, refusal: Refusal) -> None:
        self._count(f"refused_{refusal.name.lower()}")
        try:
            stream.send(pack(Kind.REFUSED, code=refusal), None, time.monotonic() + self._config.stall_s)
            stream.socket.shutdown(socket.SHUT_WR)
            _drain(stream, time.monotonic() + self._config.stall_s)
        except OSError as error:
            _log.debug("a refused peer did not wait for the reason: %s", error)

    def _count(self, outcome: str, by: int = 1) -> None:
        with self._lock:
            self._counts[outcome] += by


def _drain(stream: Stream, deadline: float, most_bytes: int = 1 << 16) -> None:
    """Read what is still under way: closing with unread bytes would reset the connection, and with it the reason."""
    scratch = memoryview(bytearray(4096))
    while most_bytes > 0 and (left := deadline - time.monotonic()) > 0:
        stream.socket.settimeout(left)
        count = stream.socket.recv_into(scratch)
        if count == 0:
            return
        most_bytes -= count


def _cut(connection: socket.socket) -> None:
    """Wake whoever waits on ``connection``."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        _log.debug("a connection was closed already: %s", error)
