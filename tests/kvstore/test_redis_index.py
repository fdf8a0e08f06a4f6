"""What nodes that share a Redis see of each other, and what remains when Redis does not."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from kv_factories import IDENTITY, OTHER_IDENTITY, name
from redis_servers import RedisServer, start_cluster

from spillway.kvstore import BlockHash
from spillway.kvstore.errors import ConfigError
from spillway.kvstore.index.base import PEER, Location
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig
from spillway.kvstore.index.redis_look_up import LOOK_UP

redis = pytest.importorskip("redis")

CHAIN = [name(number) for number in range(40)]
PATIENCE_S = 60
Open = Callable[..., RedisIndex]


@pytest.fixture(params=["redis", "cluster"])
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[RedisServer]]:
    if request.param == "cluster":
        started = start_cluster(tmp_path)
    else:
        started = [RedisServer(tmp_path / "redis")]
        started[0].start()
    yield started
    for server in started:
        server.kill()


@pytest.fixture
def open_node(servers: list[RedisServer]) -> Iterator[Open]:
    opened: list[RedisIndex] = []
    prefix = uuid4().hex

    def open_index(node: str, identity: bytes = IDENTITY.digest(), **settings: object) -> RedisIndex:
        about = {"lease_s": 2.0, "near_s": 0.0, "timeout_s": 0.5, "prefix": prefix} | settings
        url = servers[0].url.replace("redis:", "redis+cluster:") if len(servers) > 1 else servers[0].url
        config = RedisConfig(url, node, f"{node}:7000", **about)
        opened.append(RedisIndex(config, identity))
        return opened[-1]

    yield open_index
    for server in servers:
        if server.process is not None:
            server.send(signal.SIGCONT)
    for index in opened:
        index.close()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def place_of(index: RedisIndex, block: BlockHash) -> tuple[Location, ...]:
    return index.locate((block,))[0]


def seen(index: RedisIndex) -> int:
    return index.longest_prefix(CHAIN, (PEER,))


def test_a_block_of_another_node_says_where_it_is(open_node: Open) -> None:
    a, b = open_node("a"), open_node("b")
    a.publish("host", CHAIN[:2])
    a.publish("disk", CHAIN[1:3])
    assert a.settle(PATIENCE_S)
    assert b.settle(PATIENCE_S)
    assert place_of(b, CHAIN[1]) == (Location("host", "a", 1, "a:7000"), Location("disk", "a", 1, "a:7000"))
    assert seen(b) == 3
    assert b.longest_prefix(CHAIN, ("host",)) == 0
    assert place_of(a, CHAIN[0]) == (Location("host"),)
    assert seen(a) == 0, "its own entries are not elsewhere"
    b.publish("host", CHAIN[3:5])
    assert b.longest_prefix(CHAIN, ("host", PEER)) == 5
    a.withdraw("host", CHAIN[:2])
    assert a.settle(PATIENCE_S)
    assert place_of(b, CHAIN[0]) == ()
    assert [place.tier for place in place_of(b, CHAIN[1])] == ["disk"]


def test_a_chain_is_located_in_one_round_trip(open_node: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = open_node("a"), open_node("b")
    a.publish("host", CHAIN[:10])
    a.publish("disk", CHAIN[20:])
    b.publish("host", CHAIN[5:15])
    assert a.settle(PATIENCE_S)
    assert b.settle(PATIENCE_S)
    trips: list[str] = []
    script = b._calls.script

    def counted(source: str, keys: list[str], arguments: list[object]) -> object:
        trips.extend(source for _ in [None] if source is LOOK_UP)
        return script(source, keys, arguments)

    monkeypatch.setattr(b._calls, "script", counted)
    found = b.locate(CHAIN)
    assert ["".join(place.node or "-" for place in places) for places in found] == (
        ["a"] * 5 + ["-a"] * 5 + ["-"] * 5 + [""] * 5 + ["a"] * 20
    )
    assert len(trips) == 1
    assert b.longest_prefix(CHAIN, ("host", PEER)) == 15
    assert len(trips) == 2


def test_an_answer_is_used_again_for_a_moment(open_node: Open) -> None:
    a, b = open_node("a"), open_node("b", near_s=60.0)
    a.publish("host", CHAIN[:10])
    assert a.settle(PATIENCE_S)
    assert seen(b) == 10
    misses = b.stats().near["misses"]
    assert seen(b) == 10
    assert b.stats().near["misses"] == misses
    assert [len(places) for places in b.locate(CHAIN[:11])] == [1] * 10 + [0]
    assert b.stats().near["misses"] == misses + 11, "it was asked how far, not where"
    b.locate(CHAIN[5:20])
    assert b.stats().near["misses"] == misses + 20, "where five of them are is known"


def test_two_nodes_hold_one_block_and_one_lets_go(open_node: Open) -> None:
    a, b, c = open_node("a"), open_node("b"), open_node("c")
    for node in (a, b):
        node.publish("host", CHAIN)
        assert node.settle(PATIENCE_S)
    assert {place.node for place in place_of(c, CHAIN[7])} == {"a", "b"}
    a.withdraw("host", CHAIN)
    assert a.settle(PATIENCE_S)
    assert {place.node for place in place_of(c, CHAIN[7])} == {"b"}
    b.close()
    assert seen(c) == 0


def test_identities_are_apart(open_node: Open) -> None:
    a, b = open_node("a"), open_node("b", OTHER_IDENTITY.digest())
    a.publish("host", CHAIN)
    assert a.settle(PATIENCE_S)
    assert seen(b) == 0


def test_a_new_life_of_a_node_hides_the_old_ones_entries_at_once(open_node: Open, servers: list[RedisServer]) -> None:
    a, b = open_node("a"), open_node("b")
    a.publish("host", CHAIN)
    assert a.settle(PATIENCE_S)
    assert seen(b) == len(CHAIN)
    again = open_node("a")
    assert again.settle(PATIENCE_S)
    assert seen(b) == 0
    again.publish("host", CHAIN[:3])
    assert again.settle(PATIENCE_S)
    assert place_of(b, CHAIN[0]) == (Location("host", "a", 2, "a:7000"),)
    a.publish("host", CHAIN[3:6])
    eventually(lambda: a.stats().writer.get("fenced", 0) > 0)
    assert seen(b) == 3, "the old life may not write any more"
    # What it enters anew before the old entries are cleaned replaces them.
    eventually(lambda: again.stats().writer.get("cleaned", 0) >= len(CHAIN) - 3)


@pytest.mark.parametrize("with_data", [True, False])
def test_a_restart_is_made_good(open_node: Open, servers: list[RedisServer], with_data: bool) -> None:
    a, b = open_node("a"), open_node("b")
    a.publish("host", CHAIN[:20])
    assert a.settle(PATIENCE_S)
    for server in servers:
        if not with_data:
            with redis.Redis(port=server.port) as client:
                client.flushall()
        server.restart(with_data=with_data or len(servers) > 1)
    a.publish("disk", CHAIN[20:])
    a.withdraw("host", CHAIN[:1])
    a.publish("disk", CHAIN[:1])
    eventually(lambda: seen(b) == len(CHAIN))
    assert [place.tier for place in place_of(b, CHAIN[0])] == ["disk"]


def test_writes_that_redis_forgot_are_written_again(open_node: Open, servers: list[RedisServer]) -> None:
    """As after a fail-over or a restart from an older dump: an idle node finds out by its lease."""
    a, b = open_node("a"), open_node("b")
    a.publish("host", CHAIN)
    assert a.settle(PATIENCE_S)
    for server in servers:
        with redis.Redis(port=server.port) as client:
            for key in client.keys("*:writes"):
                client.hincrby(key, 1, -1)
                client.hincrby(key, 2, -1)
            for key in client.keys("*:b:*"):
                client.delete(key)
    eventually(lambda: seen(b) == len(CHAIN))
    assert a.stats().writer["resyncs"] >= 1


def test_a_generation_given_twice_is_cleaned_twice(open_node: Open, servers: list[RedisServer]) -> None:
    """Redis goes back to a dump from before the node's present generation: it gets that number again."""
    a = open_node("a")
    a.publish("host", CHAIN)
    assert a.settle(PATIENCE_S)
    for server in servers:
        with redis.Redis(port=server.port) as client:
            client.save()
    for server in servers:
        with redis.Redis(port=server.port) as client:
            for key in client.keys("*:leases"):
                client.delete(key)
    eventually(lambda: a.generation == 2)
    a.withdraw("host", CHAIN[:20])
    eventually(lambda: a.settle(0.1) and a._writer._cleaner._own_is_clean)
    for server in servers:
        server.kill()
        server.start()
    eventually(lambda: a.stats().writer["resyncs"] == 2)
    assert a.generation == 2
    eventually(lambda: _entries(servers) == 20)


def _entries(servers: list[RedisServer]) -> int:
    total = 0
    for server in servers:
        with redis.Redis(port=server.port) as client:
            total += sum(client.hlen(key) for key in client.keys("*:b:*"))
    return total


@pytest.mark.parametrize("fault", ["frozen", "killed"])
def test_without_redis_own_blocks_are_found_and_others_are_misses(
    open_node: Open, servers: list[RedisServer], fault: str
) -> None:
    a, b = open_node("a"), open_node("b")
    a.publish("host", CHAIN)
    b.publish("host", CHAIN[:5])
    assert a.settle(PATIENCE_S)
    for server in servers:
        if fault == "frozen":
            server.send(signal.SIGSTOP)
        else:
            server.kill()
    for _ in range(200):
        assert b.longest_prefix(CHAIN, ("host", PEER)) == 5
    assert b.stats().calls["failed"] >= 1
    assert b.stats().calls["breaker"] > 100, "most are turned away without waiting"
    b.publish("host", CHAIN[5:10])
    assert b.longest_prefix(CHAIN, ("host", PEER)) == 10
    for server in servers:
        if fault == "frozen":
            server.send(signal.SIGCONT)
        else:
            server.start()
    if fault == "frozen" or len(servers) == 1:
        eventually(lambda: b.longest_prefix(CHAIN, ("host", PEER)) == len(CHAIN))
        assert b.settle(PATIENCE_S)


def test_a_dead_nodes_entries_are_invisible_and_then_gone(open_node: Open, servers: list[RedisServer]) -> None:
    a, b = open_node("a"), open_node("b")
    a.publish("host", CHAIN)
    assert a.settle(PATIENCE_S)
    a.close()
    assert seen(b) == 0
    eventually(lambda: b.stats().writer.get("cleaned", 0) == len(CHAIN))
    for server in servers:
        with redis.Redis(port=server.port) as client:
            assert client.keys("*:b:*") == []
            assert client.keys("*:r:*") == []


@pytest.mark.parametrize("servers", ["redis"], indirect=True)
def test_a_large_dead_node_is_cleaned_by_one_of_the_living(open_node: Open, servers: list[RedisServer]) -> None:
    """Past 512 buckets a set is hashed, so that a scan from its start would come upon ever more empty places."""
    many = [name(number) for number in range(3000)]
    a, living = open_node("a"), [open_node(node) for node in "bcd"]
    a.publish("host", many)
    assert a.settle(PATIENCE_S)
    a.close()
    eventually(lambda: sum(node.stats().writer.get("cleaned", 0) for node in living) == len(many))
    with redis.Redis(port=servers[0].port) as client:
        assert client.keys("*:b:*") == []
        assert client.keys("*:r:*") == []


def test_who_is_long_dead_is_forgotten_and_numbers_are_not_used_again(
    open_node: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spillway.kvstore.index.redis_cleaner._FORGET_S", 0.0)
    a = open_node("a")
    assert a.settle(PATIENCE_S), "so that its number is the first"
    b = open_node("b")
    a.publish("host", CHAIN)
    assert a.settle(PATIENCE_S)
    a.close()
    eventually(lambda: b.stats().writer.get("forgotten", 0) == 1)
    again, c = open_node("a"), open_node("c")
    for node in (again, c):
        node.publish("host", CHAIN[:3])
        assert node.settle(PATIENCE_S)
    assert {place.node for place in place_of(b, CHAIN[0])} == {"a", "c"}
    assert b._writer.number == 2
    assert {again._writer.number, c._writer.number} == {3, 4}


def test_too_many_changes_are_dropped_counted_and_made_good(open_node: Open) -> None:
    a, b = open_node("a", most_changes=10), open_node("b")
    a.publish("host", CHAIN)
    assert a.stats().writer["dropped"] > 0
    eventually(lambda: seen(b) == len(CHAIN))


def test_settings_that_cannot_work_are_refused() -> None:
    for url, node, settings in (
        ("http://x", "a", {}),
        ("redis://x", "", {}),
        ("redis://x", "a|b", {}),
        ("redis://x", "a", {"timeout_s": 9.0}),
    ):
        with pytest.raises(ConfigError):
            RedisIndex(RedisConfig(url, node, **settings), IDENTITY.digest())
