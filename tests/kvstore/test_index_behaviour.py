"""What every index does. A new index joins in ``index``."""

import threading
from collections.abc import Iterator
from uuid import uuid4

import pytest
from kv_factories import IDENTITY, name
from redis_servers import RedisServer, start_cluster

from spillway.kvstore.index.base import BlockIndex
from spillway.kvstore.index.memory import MemoryIndex
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig

INDEXES = ("memory", "redis", "redis-cluster")
CHAIN = [name(number) for number in range(8)]


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(scope="session")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    servers = start_cluster(tmp_path_factory.mktemp("cluster"))
    yield servers[0].url.replace("redis://", "redis+cluster://")
    for server in servers:
        server.kill()


@pytest.fixture(params=INDEXES)
def index(request: pytest.FixtureRequest) -> Iterator[BlockIndex]:
    made: BlockIndex
    if request.param == "memory":
        made = MemoryIndex()
    else:
        url = request.getfixturevalue("cluster_url" if request.param == "redis-cluster" else "redis_url")
        made = RedisIndex(RedisConfig(url, "node-a", prefix=uuid4().hex), IDENTITY.digest())
    yield made
    made.close()


def tiers_of(index: BlockIndex, number: int) -> list[str]:
    return [location.tier for location in index.locate(CHAIN[number : number + 1])[0] if not location.node]


def test_an_unknown_block_is_nowhere(index: BlockIndex) -> None:
    assert index.locate(CHAIN[:2]) == [(), ()]
    assert index.longest_prefix(CHAIN, ("host", "disk")) == 0


def test_a_published_block_is_found_where_it_is(index: BlockIndex) -> None:
    index.publish("host", CHAIN[:2])
    index.publish("disk", CHAIN[1:3])
    assert [tiers_of(index, number) for number in range(4)] == [["host"], ["host", "disk"], ["disk"], []]


def test_a_withdrawn_block_stays_in_its_other_tiers(index: BlockIndex) -> None:
    index.publish("host", CHAIN[:1])
    index.publish("disk", CHAIN[:1])
    index.withdraw("host", CHAIN[:1])
    assert tiers_of(index, 0) == ["disk"]
    index.withdraw("disk", CHAIN[:1])
    assert tiers_of(index, 0) == []


def test_publishing_and_withdrawing_twice_changes_nothing(index: BlockIndex) -> None:
    index.publish("host", CHAIN[:1])
    index.publish("host", CHAIN[:1])
    index.withdraw("host", CHAIN[:1])
    index.withdraw("host", CHAIN[:1])
    assert tiers_of(index, 0) == []


def test_the_prefix_ends_at_the_first_gap(index: BlockIndex) -> None:
    index.publish("host", [CHAIN[0], CHAIN[1], CHAIN[3]])
    index.publish("disk", [CHAIN[2], CHAIN[5]])
    assert index.longest_prefix(CHAIN, ("host", "disk")) == 4
    assert index.longest_prefix(CHAIN, ("host",)) == 2
    assert index.longest_prefix(CHAIN, ()) == 0
    assert index.longest_prefix([], ("host",)) == 0
    assert index.longest_prefix(CHAIN[:2], ("host",)) == 2


def test_a_snapshot_holds_one_tier(index: BlockIndex) -> None:
    index.publish("host", CHAIN[:2])
    index.publish("disk", CHAIN[1:4])
    assert index.snapshot("disk") == frozenset(CHAIN[1:4])
    assert index.snapshot("never") == frozenset()


def test_changes_from_many_threads_all_count(index: BlockIndex) -> None:
    def work(tier: str, mine: list[int]) -> None:
        for number in mine * 20:
            index.publish(tier, [CHAIN[number]])
            index.longest_prefix(CHAIN, ("host", "disk"))
            index.withdraw(tier, [CHAIN[number]])
        index.publish(tier, [CHAIN[number] for number in mine])

    work_of = {"host": [0, 1, 2, 3], "disk": [2, 3, 4, 5], "peer": [5, 6, 7]}
    threads = [threading.Thread(target=work, args=item) for item in work_of.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tier, mine in work_of.items():
        assert index.snapshot(tier) == {CHAIN[number] for number in mine}


def test_a_list_is_located_past_its_gaps(index: BlockIndex) -> None:
    index.publish("host", [CHAIN[0], CHAIN[2]])
    index.publish("disk", [CHAIN[2], CHAIN[7]])
    found = [[place.tier for place in places] for places in index.locate(CHAIN)]
    assert found == [["host"], [], ["host", "disk"], [], [], [], [], ["disk"]]
    assert index.locate([]) == []
