"""Two nodes on one Redis do whatever nodes do; in the end each sees of the other what the other has, and no more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from uuid import uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from kv_factories import IDENTITY, name
from redis_servers import RedisServer

from spillway.kvstore.index.base import PEER
from spillway.kvstore.index.memory import MemoryIndex
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig

redis = pytest.importorskip("redis")

CHAIN = [name(number) for number in range(6)]
TIERS = ("host", "disk")
PATIENCE_S = 60
NODES = st.sampled_from("ab")
SOME = st.lists(st.sampled_from(CHAIN), min_size=1, max_size=4)


class SharedIndexMachine(RuleBasedStateMachine):
    """The model of a node is the embedded index, told the same."""

    port = 0

    @initialize()
    def begin(self) -> None:
        self.prefix = uuid4().hex
        self.models = {node: MemoryIndex(TIERS) for node in "ab"}
        self.nodes = {node: self.open(node) for node in "ab"}

    def open(self, node: str) -> RedisIndex:
        url = f"redis://127.0.0.1:{self.port}/0"
        config = RedisConfig(url, node, f"{node}:1", prefix=self.prefix, lease_s=1.0, near_s=0.0, buckets=4)
        return RedisIndex(config, IDENTITY.digest())

    @rule(node=NODES, tier=st.sampled_from(TIERS), blocks=SOME)
    def publish(self, node: str, tier: str, blocks: list[bytes]) -> None:
        for index in (self.nodes[node], self.models[node]):
            index.publish(tier, blocks)

    @rule(node=NODES, tier=st.sampled_from(TIERS), blocks=SOME)
    def withdraw(self, node: str, tier: str, blocks: list[bytes]) -> None:
        for index in (self.nodes[node], self.models[node]):
            index.withdraw(tier, blocks)

    @rule(node=NODES, orderly=st.booleans())
    def start_anew(self, node: str, orderly: bool) -> None:
        """As a process that ended, or one that was killed, whose lease goes on."""
        if not orderly:
            kill(self.nodes[node])
        self.nodes[node].close()
        self.nodes[node], self.models[node] = self.open(node), MemoryIndex(TIERS)

    @rule()
    def redis_forgets(self) -> None:
        with redis.Redis(port=self.port) as client:
            client.flushall()

    @rule(node=NODES, kinds=st.sets(st.sampled_from(TIERS)))
    def own_blocks_are_known_at_once(self, node: str, kinds: set[str]) -> None:
        index, model = self.nodes[node], self.models[node]
        assert index.longest_prefix(CHAIN, kinds) == model.longest_prefix(CHAIN, kinds)
        assert [index.snapshot(tier) for tier in TIERS] == [model.snapshot(tier) for tier in TIERS]
        found = index.locate(CHAIN)
        assert [tuple(place for place in places if not place.node) for places in found] == model.locate(CHAIN)

    @rule(node=NODES)
    def what_others_have_is_seen(self, node: str) -> None:
        other = "b" if node == "a" else "a"
        wanted = [[(other, tier) for tier in self.models[other].tiers_of(block)] for block in CHAIN]
        here = [bool(self.models[node].tiers_of(block)) for block in CHAIN]
        prefix = next((at for at, places in enumerate(wanted) if not places and not here[at]), len(CHAIN))
        deadline = time.monotonic() + PATIENCE_S
        while True:
            places = self.nodes[node].locate(CHAIN)
            seen = [[(place.node, place.tier) for place in each if place.node] for each in places]
            if seen == wanted and self.nodes[node].longest_prefix(CHAIN, (*TIERS, PEER)) == prefix:
                return
            assert time.monotonic() < deadline, (seen, wanted)
            time.sleep(0.005)

    def teardown(self) -> None:
        for index in getattr(self, "nodes", {}).values():
            index.close()


def kill(index: RedisIndex) -> None:
    """Stop the thread that keeps the lease, which is then not given back."""
    writer = index._writer
    with writer._changed:
        writer._closing = True
        writer._changed.notify_all()
    writer._thread.join()
    writer._held = False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    started = RedisServer(tmp_path_factory.mktemp("redis"))
    started.start()
    yield started
    started.kill()


def test_nodes_agree_in_the_end_whatever_happens(server: RedisServer) -> None:
    SharedIndexMachine.port = server.port
    run_state_machine_as_test(
        SharedIndexMachine, settings=settings(max_examples=20, stateful_step_count=15, deadline=None)
    )
