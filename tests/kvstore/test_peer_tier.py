"""Two nodes: what one holds the other loads, whatever lies between them, and never a wrong byte."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_factories import BLOCK_BYTES, IDENTITY, OTHER_IDENTITY, blank, content, header_of, name, store_config
from peer_factories import PATIENT_S, TOKEN, KnownPeers, Served, peers

from spillway.kvstore import BlockStore, ConfigError
from spillway.kvstore.header import BlockHeader
from spillway.kvstore.outcomes import MissReason
from spillway.kvstore.peer.handshake import Credentials, introduce
from spillway.kvstore.peer.tier import PeerTier
from spillway.kvstore.peer.wire import MOST_BLOCKS, Get, Kind, Stream

FRAME_STARTS = [b"", *(struct.pack("<4sBBHI", b"SPWB", 1, kind, 0, 44) for kind in Kind)]
"""Nothing, or the head of a frame whose length some kinds may have."""


SOCKETS_ONLY = pytest.mark.parametrize("way", ["sockets"], indirect=True)


@pytest.fixture(params=["sockets", "nixl"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How blocks travel."""
    kind: str = request.param
    if kind == "nixl":
        pytest.importorskip("nixl", reason="NIXL is not installed", exc_type=ImportError)
        monkeypatch.setattr("peer_factories.FABRIC", True)
    return kind


@pytest.fixture
def served(way: str) -> Iterator[Served]:
    made = Served(64)
    yield made
    made.close()


def fill(served: Served, *numbers: int) -> None:
    for number in numbers:
        served.held.store(header_of(number, content(number)), content(number))


def client(index: KnownPeers, **settings: object) -> PeerTier:
    return PeerTier(peers("", **settings), IDENTITY.digest(), index, PATIENT_S)


def answer_of(address: str, generation: int = 0, identity: bytes = IDENTITY.digest(), **settings: object) -> object:
    """What a peer with other settings is told of block 1."""
    index = KnownPeers()
    index.say([name(1)], address, generation=generation)
    tier = PeerTier(peers("", **settings), identity, index, PATIENT_S)
    try:
        return tier.load(name(1), blank())
    finally:
        assert tier.connections()[1] == 0
        tier.close()


def get(store: BlockStore, *numbers: int) -> list[bool]:
    outs = [blank() for _ in numbers]
    found = store.get_many([(name(number), out) for number, out in zip(numbers, outs, strict=True)])
    for number, out, hit in zip(numbers, outs, found, strict=True):
        assert not hit or np.array_equal(out, content(number)), f"wrong bytes for block {number}"
    return found


@pytest.mark.parametrize("host", [0, 8])
def test_a_store_loads_what_a_peer_holds_in_memory_or_on_disk(tmp_path: Path, host: int) -> None:
    numbers = range(30)
    with BlockStore.open(store_config(tmp_path / "a", host=host, disk=40, peers=peers())) as owner:
        owner.put_many([(name(number), content(number)) for number in numbers])
        assert owner.flush()
        index = KnownPeers()
        index.say([name(number) for number in numbers], owner.peer_address)
        with BlockStore.open(store_config(tmp_path / "b", host=40, peers=peers("")), index) as store:
            assert store.match([name(number) for number in (*numbers, 99)]) == 30
            assert all(get(store, *numbers))
            assert get(store, 99) == [False]
            figures = store.stats().tiers["peer"]
            assert (figures.hits, figures.loaded_bytes) == (30, 30 * BLOCK_BYTES)
            assert store.stats().tiers["host"].stores == 30, "what was fetched is kept nearby"
            assert all(get(store, *numbers))
            assert store.stats().tiers["peer"].hits == 30
            store.check()
        assert owner.stats().served["blocks"] == 30
        owner.check()


def test_a_chain_takes_one_connection_and_arrives_in_order(served: Served, way: str) -> None:
    fill(served, *range(40))
    index = KnownPeers()
    index.say([name(number) for number in range(41)], served.server.address)
    tier, out, seen = client(index), blank(), []

    def arrived(position: int, answer: object) -> bool:
        seen.append(position)
        assert isinstance(answer, BlockHeader) == (position < 40)
        assert position == 40 or np.array_equal(out, content(position))
        return True

    tier.load_each([name(number) for number in range(41)], out, time.monotonic() + PATIENT_S, arrived)
    assert seen == list(range(41))
    assert served.server.outcomes["connections"] == 1
    assert tier.connections() == (1, 0)
    tier.close()
    served.server.close(PATIENT_S)
    assert served.server.outcomes["by_nixl"] == (40 if way == "nixl" else 0)


@pytest.mark.parametrize(
    ("other", "refusal"),
    [
        ({"token": b"another token, as long"}, "refused_token"),
        ({"generation": 7}, "refused_generation"),
        ({"identity": OTHER_IDENTITY.digest()}, "refused_identity"),
    ],
)
def test_a_stranger_is_refused_with_a_reason(served: Served, other: dict[str, object], refusal: str) -> None:
    fill(served, 1)
    assert answer_of(served.server.address, **other) is MissReason.REFUSED
    assert served.server.outcomes[refusal] == 1
    assert "blocks" not in served.server.outcomes
    assert isinstance(answer_of(served.server.address), BlockHeader), "and the server goes on"


def test_a_new_generation_of_a_running_server_turns_old_links_away(served: Served) -> None:
    fill(served, 1, 2)
    index = KnownPeers()
    index.say([name(1), name(2)], served.server.address)
    tier = client(index)
    assert isinstance(tier.load(name(1), blank()), BlockHeader)
    served.generation = 3
    assert tier.load(name(2), blank()) is MissReason.REFUSED
    index.say([name(1)], served.server.address, generation=3)
    assert isinstance(tier.load(name(1), blank()), BlockHeader)
    tier.close()


def test_too_many_connections_are_turned_away() -> None:
    served = Served(4, peers(connections=1))
    fill(served, 1)
    index = KnownPeers()
    index.say([name(1)], served.server.address)
    first = client(index)
    assert isinstance(first.load(name(1), blank()), BlockHeader)
    assert answer_of(served.server.address) is MissReason.REFUSED
    assert served.server.outcomes["refused_busy"] >= 1
    first.close()
    served.close()


def test_a_block_damaged_at_its_owner_is_a_miss_and_is_withdrawn_there(tmp_path: Path, served: Served) -> None:
    fill(served, 1, 2, 3)
    with served.held.pinned(name(2)) as pinned:
        assert pinned is not None
        pinned.padded[100] ^= 1
    index = KnownPeers()
    index.say([name(1), name(2), name(3)], served.server.address)
    with BlockStore.open(store_config(tmp_path, host=8, peers=peers("")), index) as store:
        assert get(store, 1, 2, 3) == [True, False, True]
        figures = store.stats().tiers["peer"]
        assert (figures.misses["checksum"], figures.verify_failures) == (1, 1)
        assert get(store, 2) == [False], "and it is not asked for again"
        assert store.stats().tiers["peer"].misses["checksum"] == 1
    served.server.close(PATIENT_S)
    assert served.server.outcomes["bad_reports"] == 1
    assert [served.held.contains(name(number)) for number in (1, 2, 3)] == [True, False, True]


class Relay:
    """Passes bytes between a peer and its server; cuts a connection after so many bytes, or flips a bit on the way."""

    def __init__(self, address: str, *, cut_after: int = 0, flip_at: int = 0) -> None:
        host, port = address.rsplit(":", 1)
        self._target = (host, int(port))
        self._cut_after = cut_after
        self._flip_at = flip_at
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENT_S)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            far = socket.create_connection(self._target)
            struck = self.connections == 1
            threads = [
                threading.Thread(target=self._pass, args=(near, far, False)),
                threading.Thread(target=self._pass, args=(far, near, struck)),
            ]
            self._threads += threads
            for thread in threads:
                thread.start()

    def _pass(self, source: socket.socket, sink: socket.socket, struck: bool) -> None:
        passed = 0
        try:
            while data := bytearray(source.recv(4096)):
                if struck and self._flip_at and passed <= self._flip_at < passed + len(data):
                    data[self._flip_at - passed] ^= 0x10
                if struck and self._cut_after and passed + len(data) > self._cut_after:
                    break
                sink.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def test_a_cut_connection_is_opened_again_for_what_had_not_arrived(tmp_path: Path, served: Served, way: str) -> None:
    fill(served, *range(20))
    relay = Relay(served.server.address, cut_after=5 * BLOCK_BYTES if way == "sockets" else 1500)
    index = KnownPeers()
    index.say([name(number) for number in range(20)], relay.address)
    with BlockStore.open(store_config(tmp_path, host=40, peers=peers(""), read_threads=1), index) as store:
        assert all(get(store, *range(20)))
        assert store.stats().tiers["peer"].hits == 20
    relay.close()
    assert relay.connections == 2
    assert served.server.outcomes["blocks"] < 40, "what had arrived was asked for again"


@SOCKETS_ONLY
@pytest.mark.parametrize("flip_at", [1000, 3 * BLOCK_BYTES, 5 * BLOCK_BYTES + 77])
def test_a_bit_flipped_on_the_way_never_reaches_a_caller(tmp_path: Path, served: Served, flip_at: int) -> None:
    fill(served, *range(10))
    relay = Relay(served.server.address, flip_at=flip_at)
    index = KnownPeers()
    index.say([name(number) for number in range(10)], relay.address)
    with BlockStore.open(store_config(tmp_path, host=40, peers=peers(""), read_threads=1), index) as store:
        found = get(store, *range(10))
        assert found.count(False) <= 1
        figures = store.stats().tiers["peer"]
        assert figures.verify_failures + relay.connections >= 2 or all(found), "the damage shows"
    relay.close()
    assert all(served.held.contains(name(number)) for number in range(10)), "the owner's copies are good, and stay"


def test_a_dead_peer_costs_misses_and_not_the_others(tmp_path: Path, served: Served) -> None:
    fill(served, *range(6))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    index = KnownPeers()
    index.say([name(number) for number in range(3)], address)
    index.say([name(3), name(4)], served.server.address)
    index.say([name(5)], address, served.server.address)
    with BlockStore.open(store_config(tmp_path, host=20, peers=peers("")), index) as store:
        for _ in range(5):
            assert get(store, 0, 1, 2, 3, 4) == [False, False, False, True, True]
        assert get(store, 5) == [True], "another peer has it too"
        figures = store.stats().tiers["peer"]
        assert figures.breaker == "closed"
        assert set(figures.misses) <= {"unreachable", "breaker", "absent"}


@SOCKETS_ONLY
def test_a_peer_that_does_not_read_is_let_go_of() -> None:
    served = Served(64, peers(stall_s=0.2, slowest_bytes_s=1e9))
    fill(served, *range(60))
    with connected(served.server.address) as stream:
        introduce(stream, Credentials(TOKEN, IDENTITY.digest(), 0), soon())
        blocks = tuple(name(number % 60) for number in range(MOST_BLOCKS))
        for request in range(20):
            stream.send(Get(request, PATIENT_S, blocks).pack(), None, soon())
        until = soon()
        while served.server.connections and time.monotonic() < until:
            time.sleep(0.01)
        assert served.server.outcomes["lost"] == 1
        assert served.held.usage().pinned == 0
    served.close()


def connected(address: str) -> contextlib.closing[Stream]:
    """A bare connection with a small receive buffer."""
    host, port = address.rsplit(":", 1)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    return contextlib.closing(Stream(connection))


def soon() -> float:
    return time.monotonic() + PATIENT_S


@SOCKETS_ONLY
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=12, max_size=400), known=st.booleans(), prefix=st.sampled_from(FRAME_STARTS))
def test_garbage_is_refused_with_a_code(served: Served, garbage: bytes, known: bool, prefix: bytes) -> None:
    """Before or after the handshake: the connection ends with a coded refusal, or at the deadline of the handshake."""
    before = sum(count for key, count in served.server.outcomes.items() if key.startswith("refused"))
    with connected(served.server.address) as stream:
        if known:
            introduce(stream, Credentials(TOKEN, IDENTITY.digest(), 0), soon())
        with contextlib.suppress(OSError):
            stream.send(prefix + garbage, None, soon())
            stream.socket.shutdown(socket.SHUT_WR)
            stream.socket.settimeout(PATIENT_S)
            while stream.socket.recv(4096):
                pass
    fill(served, 1)
    assert isinstance(answer_of(served.server.address), BlockHeader), "the server goes on"
    after = served.server.outcomes
    assert "internal" not in after
    if not prefix:
        assert sum(count for key, count in after.items() if key.startswith("refused")) == before + 1


@SOCKETS_ONLY
def test_an_address_that_cannot_be_had_is_said_and_leaves_nothing_open(tmp_path: Path, served: Served) -> None:
    config = store_config(tmp_path, host=4, disk=8, peers=peers(served.server.address))
    with pytest.raises(ConfigError, match="cannot listen"):
        BlockStore.open(config)
    BlockStore.open(store_config(tmp_path, host=4, disk=8)).close()


@SOCKETS_ONLY
@pytest.mark.parametrize(
    "settings", [{"token": b"short"}, {"listen": "nowhere"}, {"listen": "a:70000"}, {"stall_s": 0}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        peers(**settings)


def test_a_peer_without_nixl_sends_blocks_as_ever(way: str) -> None:
    served = Served(4, peers(fabric=False))
    fill(served, 1)
    assert isinstance(answer_of(served.server.address), BlockHeader), way
    served.close()
    assert served.server.outcomes["by_nixl"] == 0


@SOCKETS_ONLY
def test_nixl_is_refused_where_it_is_not_or_where_it_would_go_round_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="TLS"):
        peers(fabric=True, client_tls=ssl.create_default_context())
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match="installed"):
        peers(fabric=True)


@SOCKETS_ONLY
def test_the_token_is_not_shown() -> None:
    assert "a token of the tests" not in repr(peers())
