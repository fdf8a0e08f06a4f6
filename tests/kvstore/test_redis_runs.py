"""However blocks came and went, a look-up by runs finds what one block by block would; and Redis's clock may jump."""

import time
from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_factories import IDENTITY, name
from redis_servers import RedisServer

from spillway.kvstore import BlockHash
from spillway.kvstore.index.base import PEER
from spillway.kvstore.index.memory import MemoryIndex
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig
from spillway.kvstore.index.redis_scripts import CLEAN, RENEW, SEGMENT_BLOCKS

redis = pytest.importorskip("redis")

CHAIN = [name(number) for number in range(3 * SEGMENT_BLOCKS)]
PATIENCE_S = 60
NODES = ("a", "b")
Open = Callable[..., RedisIndex]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    started = RedisServer(tmp_path_factory.mktemp("redis"))
    started.start()
    yield started
    started.kill()


@pytest.fixture
def open_node(server: RedisServer) -> Iterator[Open]:
    opened: list[RedisIndex] = []
    prefix = uuid4().hex

    def open_index(node: str, lease_s: float = 20.0) -> RedisIndex:
        config = RedisConfig(
            server.url, node, f"{node}:1", prefix=prefix, lease_s=lease_s, near_s=0.0, timeout_s=lease_s / 4
        )
        opened.append(RedisIndex(config, IDENTITY.digest()))
        assert opened[-1].settle(PATIENCE_S)
        return opened[-1]

    yield open_index
    for index in opened:
        index.close()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def places(index: RedisIndex, blocks: list[BlockHash]) -> list[set[tuple[str, str]]]:
    return [{(place.node, place.tier) for place in found} for found in index.locate(blocks)]


def lease(client: "redis.Redis[bytes]", index: RedisIndex) -> tuple[str, str, list[str]]:
    """Key of the leases, the node's number, and its lease in parts."""
    leases, number = index._keys.of("leases"), str(index._writer.number)
    return leases, number, client.hget(leases, number).decode().split("|")


ends = st.integers(0, len(CHAIN))
CHANGE = st.tuples(
    st.sampled_from(NODES), st.sampled_from(["publish", "withdraw"]), st.sampled_from(["host", "disk"]),
    ends, ends, st.sampled_from([1, -1, 2, 7]),
)  # fmt: skip


def test_runs_find_what_is_there_and_no_more(open_node: Open) -> None:
    nodes, reader = {node: open_node(node) for node in NODES}, open_node("reader")

    @settings(max_examples=40, deadline=None)
    @given(st.lists(CHANGE, min_size=1, max_size=6), st.lists(ends, min_size=1, max_size=4))
    def hold(changes: list[tuple[str, str, str, int, int, int]], starts: list[int]) -> None:
        models = {node: MemoryIndex(("host", "disk")) for node in NODES}
        for node, what, tier, first, last, step in changes:
            blocks = CHAIN[min(first, last) : max(first, last)][::step]
            for index in (nodes[node], models[node]):
                getattr(index, what)(tier, blocks)
        assert all(index.settle(PATIENCE_S) for index in nodes.values())
        there = [{(node, tier) for node in NODES for tier in models[node].tiers_of(block)} for block in CHAIN]
        assert places(reader, CHAIN) == there
        for start in (0, *starts):
            gap = next((at for at in range(start, len(CHAIN)) if not there[at]), len(CHAIN))
            assert reader.longest_prefix(CHAIN[start:], (PEER,)) == gap - start
        for index in nodes.values():
            for tier in ("host", "disk"):
                index.withdraw(tier, CHAIN)
            assert index.settle(PATIENCE_S)

    hold()


@pytest.mark.parametrize("step", [1, -1])
def test_a_chain_that_was_entered_together_takes_few_steps(open_node: Open, server: RedisServer, step: int) -> None:
    a, b = open_node("a"), open_node("b")
    for start in range(0, len(CHAIN), 32):
        a.publish("host", CHAIN[start : start + 32][::step])
    assert a.settle(PATIENCE_S)
    with redis.Redis(port=server.port) as client:
        client.config_resetstat()
        assert b.longest_prefix(CHAIN, (PEER,)) == len(CHAIN)
        assert client.info("commandstats")["cmdstat_hget"]["calls"] < len(CHAIN) / 8


def test_segments_go_with_their_blocks_and_with_their_node(open_node: Open, server: RedisServer) -> None:
    a, b = open_node("a"), open_node("b", lease_s=1.0)
    a.publish("host", CHAIN)
    a.publish("disk", CHAIN[:200])
    assert a.settle(PATIENCE_S)
    with redis.Redis(port=server.port) as client:
        leases, number, _ = lease(client, a)
        segments = leases.replace("leases", f"s:{number}")

        def marks() -> int:
            return sum(len(value) for value in client.hvals(segments)) // 8

        assert marks() == len(CHAIN), "each block is in one segment only"
        a.withdraw("host", CHAIN[100:])
        assert a.settle(PATIENCE_S)
        assert marks() == 200
        a.close()
        eventually(lambda: client.exists(segments) == 0)
    b.close()


def test_a_lease_from_before_the_clock_jumped_back_does_not_hold(open_node: Open, server: RedisServer) -> None:
    a, b = open_node("a", lease_s=1.0), open_node("b", lease_s=1.0)
    a.publish("host", CHAIN)
    assert a.settle(PATIENCE_S)
    a.close()
    with redis.Redis(port=server.port) as client:
        leases, number, parts = lease(client, a)
        parts[1] = str(int(parts[1]) + 3_600_000)
        client.hset(leases, number, "|".join(parts))
        assert b.longest_prefix(CHAIN, (PEER,)) == 0
        eventually(lambda: b.stats().writer.get("cleaned", 0) == len(CHAIN))


def test_the_living_get_over_a_clock_that_jumps_back(open_node: Open, server: RedisServer) -> None:
    a, b = open_node("a", lease_s=4.0), open_node("b", lease_s=4.0)
    a.publish("host", CHAIN)
    assert a.settle(PATIENCE_S)
    with redis.Redis(port=server.port) as client:
        leases, number, parts = lease(client, a)
        parts[1] = str(int(parts[1]) + 3_600_000)
        client.hset(leases, number, "|".join(parts))
        eventually(lambda: b.longest_prefix(CHAIN, (PEER,)) == len(CHAIN))
    assert "resyncs" not in a.stats().writer, "its next renewal was enough"


def test_who_was_cleaned_while_the_clock_was_ahead_cannot_renew(open_node: Open, server: RedisServer) -> None:
    """Else it would not notice that its entries are gone."""
    a = open_node("a")
    a.publish("host", CHAIN[:1])
    assert a.settle(PATIENCE_S)
    with redis.Redis(port=server.port) as client:
        leases, number, parts = lease(client, a)
        of = leases.removesuffix("leases")
        renew, clean = client.register_script(RENEW), client.register_script(CLEAN)
        held = {"keys": [leases, f"{of}writes"], "args": [number, parts[0], 1, parts[2], 60_000]}
        assert renew(**held) == 1
        (bucket,) = client.smembers(f"{of}r:{number}")
        keys = [leases, f"{of}r:{number}", f"{of}b:{bucket.decode()}"]
        assert clean(keys=keys, args=[number, parts[0], bucket, 1]) == 1
        assert renew(**held) == -1
