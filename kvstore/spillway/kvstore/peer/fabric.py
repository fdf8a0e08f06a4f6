"""The bytes of blocks by NIXL: from memory to memory over RDMA where there is a fabric, else over what UCX finds.

The connection between peers stays: it says who may ask, what is asked for, and what is where. Only the stored bytes go
another way. The server copies a block into one of a few slots of registered memory and tells where it lies; the client
reads it from there into registered memory of its own, and says that it has. So no block is held in place while a peer
takes its time, and whatever a transfer that was given up still does, it does to memory that nothing else uses.

Each connection has an agent of its own, used by one thread, which ends with it.
"""

from __future__ import annotations

import logging
import time
from typing import Any
from uuid import uuid4

from ..buffers import Bytes, address, aligned, copy, round_up
from ..errors import ConfigError, PeerError

_log = logging.getLogger(__name__)

SLOTS = 2
"""One is read while the other is filled."""
_LOOK_S = 20e-6


def nixl() -> Any:
    """Its Python API. Raises `ConfigError` where it is not installed."""
    try:
        from nixl import _api
    except ImportError as error:
        raise ConfigError(
            f"blocks travel by NIXL where it is installed (pip install 'spillway[nixl]'): {error}"
        ) from None
    return _api


class _Registered:
    """Memory that peers can reach, and the agent that made it so.

    Raises `PeerError`, whatever the bindings raise: they have a dozen unrelated types.
    """

    def __init__(self, length: int) -> None:
        self.memory = aligned(length)
        self.start = address(self.memory)
        api = nixl()
        try:
            self.agent = api.nixl_agent(uuid4().hex, api.nixl_agent_config(backends=["UCX"]))
            self.registered = self.agent.register_memory([(self.start, length, 0, "")], "DRAM")
        except Exception as error:
            raise PeerError(f"NIXL cannot be used here: {error}") from error

    def close(self) -> None:
        """Let go of the memory, which is freed after the agent that transfers may run under."""
        try:
            self.agent.deregister_memory(self.registered)
        except Exception:  # noqa: BLE001 - it is let go of all the same, and the bindings raise a dozen types
            _log.warning("NIXL did not let go of memory", exc_info=True)
        self.agent = None


class Slots(_Registered):
    """The server's side of one connection."""

    def __init__(self, most_bytes: int) -> None:
        """``most_bytes``: of a block."""
        self._slot_bytes = round_up(most_bytes)
        super().__init__(SLOTS * self._slot_bytes)
        self._next = 0

    def card(self) -> bytes:
        """What the client needs to reach the slots."""
        try:
            return bytes(self.agent.get_agent_metadata())
        except Exception as error:
            raise PeerError(f"NIXL does not say how it is reached: {error}") from error

    def place(self, stored: Bytes) -> int:
        """Copy ``stored`` into the next slot; its address."""
        at = self._next * self._slot_bytes
        self._next = (self._next + 1) % SLOTS
        copy(self.memory[at : at + stored.nbytes], stored)
        return self.start + at


class Landing(_Registered):
    """The client's side of one connection."""

    def __init__(self, card: bytes, most_bytes: int) -> None:
        """``card``: of the server's slots. ``most_bytes``: of a block."""
        super().__init__(most_bytes)
        try:
            self._peer = self.agent.add_remote_agent(card)
        except Exception as error:
            raise PeerError(f"NIXL does not know the peer: {error}") from error

    def read(self, start: int, length: int, deadline: float) -> Bytes:
        """The ``length`` bytes at the peer's ``start``; they stay until the next call. Raises TimeoutError too."""
        try:
            here = self.agent.get_xfer_descs([(self.start, length, 0)], "DRAM")
            there = self.agent.get_xfer_descs([(start, length, 0)], "DRAM")
            transfer = self.agent.initialize_xfer("READ", here, there, self._peer)
            try:
                state = self.agent.transfer(transfer)
                while state == "PROC" and time.monotonic() < deadline:
                    time.sleep(_LOOK_S)
                    state = self.agent.check_xfer_state(transfer)
            finally:
                self.agent.release_xfer_handle(transfer)
        except Exception as error:
            raise PeerError(f"NIXL could not read from the peer: {error}") from error
        if state == "PROC":
            raise TimeoutError("the peer did not get on in time")
        if state != "DONE":
            raise PeerError(f"NIXL could not read from the peer: it ended as {state}")
        return self.memory[:length]
