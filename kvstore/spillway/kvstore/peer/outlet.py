"""How blocks leave a server: on the connection itself, or through slots that the client reads by NIXL."""

from __future__ import annotations

import logging
import time

from ..errors import PeerError, PeerProtocolError
from .config import PeersConfig
from .fabric import SLOTS, Slots
from .sources import Found
from .wire import Kind, Stream, pack, pack_block, pack_placed

_log = logging.getLogger(__name__)


class Outlet:
    """That of one connection, used by its thread. Raises OSError and `PeerProtocolError`."""

    def __init__(self, stream: Stream, config: PeersConfig, most_bytes: int) -> None:
        """``most_bytes``: of a block."""
        self._stream = stream
        self._config = config
        self._most_bytes = most_bytes
        self._slots: Slots | None = None
        self._unread = 0

    def join(self) -> None:
        """The client wants to read by NIXL: make slots and say how to reach them, or say that there are none."""
        card = b""
        if self._config.fabric and self._slots is None:
            try:
                self._slots = Slots(self._most_bytes)
                card = self._slots.card()
            except PeerError as error:
                _log.warning("blocks go by the connection instead: %s", error)
                self.close()
        self._stream.send(pack(Kind.FABRIC, card), None, self._patience(0))

    def send(self, request: int, position: int, found: Found) -> bool:
        """Answer with a block; whether it goes by NIXL. What it lies in may be reused afterwards."""
        header, length = found.header.pack(0), found.stored.nbytes
        if self._slots is None:
            head = pack_block(request, position, header, length)
            self._stream.send(head, found.stored.data, self._patience(length))
            return False
        while self._unread >= SLOTS:
            self._await_reading()
        start = self._slots.place(found.stored)
        self._stream.send(pack_placed(request, position, header, (start, length)), None, self._patience(0))
        self._unread += 1
        return True

    def settle(self) -> None:
        """Wait until the client has read all that was placed."""
        while self._unread:
            self._await_reading()

    def close(self) -> None:
        """Let go of the slots."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.close()

    def _await_reading(self) -> None:
        frame = self._stream.head((Kind.TAKEN,), self._patience(self._most_bytes))
        if frame.kind is not Kind.TAKEN:
            raise PeerProtocolError("a client has nothing to refuse")
        self._unread -= 1

    def _patience(self, length: int) -> float:
        return time.monotonic() + self._config.stall_s + length / self._config.slowest_bytes_s
