"""`spillway kv …` against real stores that share a real Redis, and against their disk directories."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_factories import BLOCK_BYTES, IDENTITY, OTHER_IDENTITY, blank, content, name, store_config
from peer_factories import TOKEN, peers
from redis_servers import RedisServer, free_port, start_cluster
from typer.testing import CliRunner

from spillway.api.errors import SpillwayError
from spillway.cli.main import app
from spillway.kvstore import BlockStore, KVIdentity
from spillway.kvstore.index.about import About
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig
from spillway.kvstore.tiers.host import HostTier

redis = pytest.importorskip("redis")
PATIENCE_S = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    started = RedisServer(tmp_path_factory.mktemp("redis"))
    started.start()
    yield started
    started.kill()


class Nodes:
    """Stores of this process, each a node of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self._open: list[BlockStore] = []

    def start(self, node: str, identity: KVIdentity = IDENTITY, metrics: str = "", lease_s: float = 30.0) -> BlockStore:
        address = f"127.0.0.1:{free_port()}"
        about = About(identity.digest().hex(), identity.weights_digest, identity.kv_dtype, "0/1", 8192, metrics)
        config = RedisConfig(self.url, node, address, about, lease_s=lease_s, near_s=0.0)
        index = RedisIndex(config, identity.digest())
        settings = store_config(self.folder / node, host=8, disk=60, peers=peers(address), identity=identity)
        self._open.append(BlockStore.open(settings, index))
        assert index.settle(PATIENCE_S)
        return self._open[-1]

    def close(self) -> None:
        for store in self._open:
            store.close()


@pytest.fixture
def nodes(server: RedisServer, tmp_path: Path) -> Iterator[Nodes]:
    with redis.Redis(port=server.port) as client:
        client.flushall()
    made = Nodes(server.url, tmp_path)
    yield made
    made.close()


@pytest.fixture
def secret(tmp_path: Path) -> list[str]:
    path = tmp_path / "secret"
    path.write_bytes(TOKEN + b"\n")
    return ["--peer-token-file", str(path)]


def kv(*arguments: object) -> tuple[int, str]:
    """Exit status and what was printed; for an error of ours, its message."""
    result = CliRunner().invoke(app, ["kv", *(str(each) for each in arguments)])
    if isinstance(result.exception, SpillwayError):
        return 1, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def rows(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
    status, text = kv(*arguments, "--json")
    return status, [json.loads(line) for line in text.splitlines()]


def put(store: BlockStore, numbers: range, identity: KVIdentity = IDENTITY) -> None:
    assert all(store.put_many([(name(number, identity), content(number)) for number in numbers]))
    assert store.flush()
    assert index_of(store).settle(PATIENCE_S)


def index_of(store: BlockStore) -> RedisIndex:
    index = store._parts.index
    assert isinstance(index, RedisIndex)
    return index


def host_of(store: BlockStore) -> HostTier:
    return store._parts.held


def hexes(*numbers: int) -> list[str]:
    return [name(number).hex() for number in numbers]


def spoil(directory: Path, *numbers: int) -> None:
    """Flip a bit of what is stored of these blocks, in a directory of blocks that all hold their own content."""
    for segment in directory.glob("share-*/segment-*.kv"):
        data = segment.read_bytes()
        with segment.open("r+b") as file:
            for number in numbers:
                at = data.find(content(number)[:64].tobytes())
                assert at > 0
                file.seek(at + 100)
                file.write(bytes([data[at + 100] ^ 4]))


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


# ── status ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_status_counts_what_each_node_has_and_what_the_dead_left(nodes: Nodes) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    from spillway.kvstore.metrics import StoreCollector

    registry = prometheus.CollectorRegistry()
    page, thread = prometheus.start_http_server(0, "127.0.0.1", registry)
    a, _ = nodes.start("a", metrics=f"127.0.0.1:{page.server_port}"), nodes.start("b")
    registry.register(StoreCollector(a.stats))
    put(a, range(20))
    assert a.get_many([(name(0), blank()), (name(99), blank())]) == [True, False]
    dead = nodes.start("dead", OTHER_IDENTITY)
    put(dead, range(5), OTHER_IDENTITY)
    dead.close()
    status, text = kv("status", "--kv-index", nodes.url, "--disk-dir", nodes.folder / "a", "--json")
    found = json.loads(text)
    assert status == 0
    spaces = {space["weights"]: space for space in found["identities"]}
    ours, others = spaces["weights-a"], spaces["weights-b"]
    first, second = ours["nodes"]
    assert (first["node"], first["live"], first["generation"]) == ("a", True, 1)
    assert first["tiers"]["disk"] == {"blocks": 20, "block_bytes": 20 * 8192}
    assert first["tiers"]["host"]["blocks"] == a.stats().tiers["host"].blocks
    assert (ours["blocks"], ours["stale_entries"]) == (20, 0)
    assert first["figures"]["hit_share"] == 0.5
    assert first["figures"]["tiers"]["disk"]["breaker"] == "closed"
    assert second["tiers"] == {tier: {"blocks": 0, "block_bytes": 0} for tier in ("host", "disk")}
    assert "--health-listen" in second["no_figures"]
    assert (others["blocks"], others["stale_entries"], others["nodes"][0]["live"]) == (5, 5, False)
    (share,) = found["disk"]["shares"]
    assert (share["blocks"], share["weights"]) == (20, "weights-a")
    assert share["open_in"].startswith("process")
    _, shown = kv("status", "--kv-index", nodes.url, "--disk-dir", nodes.folder / "a")
    assert "50%" in shown
    assert "5 stale entries" in shown
    assert "20 (160 KiB)" in shown
    page.shutdown()
    page.server_close()
    thread.join()


def test_status_of_an_empty_index_says_so(nodes: Nodes) -> None:
    status, text = kv("status", "--kv-index", nodes.url)
    assert status == 0
    assert "no blocks" in text


# ── where ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_finds_blocks_by_the_start_of_their_hash(nodes: Nodes) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    put(a, range(12))
    put(b, range(10, 12))
    whole, start, missing = name(11).hex(), name(3).hex()[:12], name(99).hex()
    found = ("where", whole, start, missing, "--kv-index", nodes.url, "--disk-dir", nodes.folder / "b")
    status, answer = rows(*found)
    assert status == 3, "one is nowhere"
    both, one, none = answer
    assert {place["node"] for place in both["places"]} == {"a", "b"}
    assert both["files"][0]["share"] == "share-00"
    assert (one["block"], [place["node"] for place in one["places"]]) == (name(3).hex(), ["a"])
    assert (none["places"], none["files"]) == ([], [])
    _, text = kv(*found)
    assert "nowhere" in text.splitlines()[2]
    assert rows("where", whole, "--kv-index", nodes.url)[0] == 0


# ── verify and scrub ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_damaged_block_of_an_idle_directory_is_found_and_withdrawn(tmp_path: Path) -> None:
    config = store_config(tmp_path / "d", host=4, disk=40)
    with BlockStore.open(config) as store:
        store.put_many([(name(number), content(number)) for number in range(20)])
    assert rows("verify", "--disk-dir", tmp_path / "d")[0] == 0
    spoil(tmp_path / "d", 3, 7)
    for verb, withdrawn in (("verify", None), ("verify", None), ("scrub", 2)):
        status, (*faults, tally) = rows(verb, "--disk-dir", tmp_path / "d")
        assert status == 3
        assert {row["block"] for row in faults} == {name(3).hex(), name(7).hex()}
        assert {row["reason"].split()[0] for row in faults} == {"checksum"}
        assert (tally["whole"], tally["damaged"], tally.get("withdrawn")) == (18, 2, withdrawn)
    status, text = kv("scrub", "--disk-dir", tmp_path / "d")
    assert status == 0
    assert "18 whole, 0 damaged" in text
    with BlockStore.open(config) as store:
        assert [number for number in range(20) if not store.contains(name(number))] == [3, 7]
        store.check()
        assert all(store.put_many([(name(number), content(number)) for number in (3, 7)])), "and the slots serve again"


def test_a_damaged_header_is_found_and_erased(tmp_path: Path) -> None:
    config = store_config(tmp_path / "d", host=4, disk=40)
    with BlockStore.open(config) as store:
        store.put_many([(name(number), content(number)) for number in range(20)])
    (segment,) = (tmp_path / "d").glob("share-*/segment-*.kv")
    with segment.open("r+b") as file:
        file.seek(segment.read_bytes().find(content(5)[:64].tobytes()) + BLOCK_BYTES + 50)
        file.write(b"damage")
    status, (fault, tally) = rows("scrub", "--disk-dir", tmp_path / "d")
    assert (status, fault["block"], fault["reason"].split()[0]) == (3, "", "header")
    assert (tally["whole"], tally["damaged"], tally["withdrawn"]) == (19, 1, 1)
    assert rows("verify", "--disk-dir", tmp_path / "d")[0] == 0
    with BlockStore.open(config) as store:
        assert [number for number in range(20) if not store.contains(name(number))] == [5]
        assert store.stats().tiers["disk"].damaged == 0


def test_a_directory_in_use_is_verified_beside_its_store(tmp_path: Path) -> None:
    with BlockStore.open(store_config(tmp_path / "d", host=4, disk=40)) as store:
        store.put_many([(name(number), content(number)) for number in range(20)])
        assert store.flush()
        assert rows("verify", "--disk-dir", tmp_path / "d")[0] == 0
        spoil(tmp_path / "d", 3)
        status, (fault, tally) = rows("scrub", "--disk-dir", tmp_path / "d")
        assert status == 3
        assert fault["block"] == name(3).hex()
        assert "--node" in tally["trouble"], "its store alone may withdraw it"
        assert tally["withdrawn"] == 0


def test_slots_that_are_being_written_are_not_called_damaged(tmp_path: Path) -> None:
    """A store of few slots under many writes, and a reader beside it."""
    with BlockStore.open(store_config(tmp_path / "d", host=4, disk=12)) as store:
        from threading import Event, Thread

        done = Event()

        def churn() -> None:
            number = 0
            while not done.is_set():
                store.put_many([(name(number + each), content((number + each) % 50)) for each in range(8)])
                number += 8

        writer = Thread(target=churn)
        writer.start()
        try:
            for _ in range(8):
                status, (*faults, _) = rows("verify", "--disk-dir", tmp_path / "d")
                assert (status, faults) == (0, [])
        finally:
            done.set()
            writer.join()


def test_nodes_are_verified_over_the_network_and_scrub_themselves(nodes: Nodes, secret: list[str]) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    put(a, range(20))
    put(b, range(3))
    asked = ("--kv-index", nodes.url, *secret)
    status, tallies = rows("verify", *asked)
    assert status == 0
    assert [(tally["place"], tally["whole"]) for tally in tallies] == [("a", 20), ("b", 3)]
    held = next(number for number in range(20) if host_of(a).contains(name(number)))
    with host_of(a).pinned(name(held)) as pinned:
        assert pinned is not None
        pinned.padded[50] ^= 1
    status, (fault, tally) = rows("verify", *asked, "--node", "a")
    assert status == 3
    assert (fault["block"], fault["reason"], tally["whole"]) == (name(held).hex(), "checksum", 19)
    assert host_of(a).contains(name(held)), "verify changes nothing in memory"
    status, (fault, tally) = rows("scrub", *asked, "--node", "a")
    assert status == 3
    assert (fault["block"], tally["damaged"], tally["withdrawn"]) == (name(held).hex(), 1, 1)
    assert not host_of(a).contains(name(held))
    assert rows("scrub", *asked)[0] == 0, "what is left is whole, its copy on disk among it"
    out = blank()
    assert a.get_many([(name(held), out)]) == [True]
    assert np.array_equal(out, content(held))


# ── drop ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_dropped_unless_somebody_says_so(nodes: Nodes, secret: list[str]) -> None:
    a = nodes.start("a")
    put(a, range(10))
    status, message = kv("drop", "--node", "a", "--kv-index", nodes.url, *secret)
    assert status == 1
    assert "--yes" in message
    assert all(a.contains(name(number)) for number in range(10))
    status, message = kv("drop", "--kv-index", nodes.url, *secret, "--yes")
    assert (status, "what is to be dropped" in message) == (1, True)


def test_blocks_of_living_nodes_are_dropped_by_hash_and_by_node(nodes: Nodes, secret: list[str]) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    put(a, range(20))
    put(b, range(5))
    asked = ("--kv-index", nodes.url, *secret, "--yes")
    status, done = rows("drop", *hexes(1, 2), *asked)
    assert (status, len(done)) == (0, 2)
    assert [name(number) in index_of(a).snapshot("disk") for number in range(4)] == [True, False, False, True]
    assert not index_of(b).snapshot("disk") & {name(1), name(2)}
    assert kv("drop", "--node", "b", *asked)[0] == 0
    assert all(index_of(store).settle(PATIENCE_S) for store in (a, b))
    assert not any(index_of(b).snapshot(tier) for tier in ("host", "disk"))
    assert name(0) in index_of(a).snapshot("disk")
    for store in (a, b):
        store.check()
    _, text = kv("status", "--kv-index", nodes.url, "--json")
    assert [node["tiers"]["disk"]["blocks"] for node in json.loads(text)["identities"][0]["nodes"]] == [18, 0]


def test_the_dead_are_forgotten(nodes: Nodes) -> None:
    dead = nodes.start("dead", OTHER_IDENTITY)
    put(dead, range(20), OTHER_IDENTITY)
    dead.close()
    asked = ("--kv-index", nodes.url, "--yes")
    assert kv("drop", "--node", "dead", *asked) == (
        0,
        f"dead node dead of identity {OTHER_IDENTITY.digest().hex()[:32]}: its name and entries: 20 entries deleted\n",
    )
    with redis.Redis.from_url(nodes.url) as client:
        left = [key for key in client.keys("*") if not key.endswith(b":cleaner")]  # that one expires
        assert left == [], "the last of an identity leaves no key"
    status, message = kv("drop", "--node", "dead", *asked)
    assert (status, "no node dead" in message) == (1, True)


def test_an_identity_of_the_dead_leaves_no_key(nodes: Nodes) -> None:
    nodes.start("a")
    dead = nodes.start("dead", OTHER_IDENTITY)
    put(dead, range(20), OTHER_IDENTITY)
    dead.close()
    space = OTHER_IDENTITY.digest().hex()[:32]
    assert kv("drop", "--identity", space[:6], "--kv-index", nodes.url, "--yes")[0] == 0
    with redis.Redis.from_url(nodes.url) as client:
        assert client.keys(f"*{space}*") == []
        assert client.keys("*:leases"), "the living are left alone"


def test_directories_are_emptied_where_no_store_is_open(tmp_path: Path) -> None:
    config = store_config(tmp_path / "d", host=4, disk=40)
    with BlockStore.open(config) as store:
        store.put_many([(name(number), content(number)) for number in range(20)])
        assert store.flush()
        status, message = kv("drop", "--disk-dir", tmp_path / "d", "--yes")
        assert (status, "nothing to drop" in message) == (1, True)
    status, _ = kv("drop", *hexes(4), "--disk-dir", tmp_path / "d", "--yes")
    assert status == 0
    with BlockStore.open(config) as store:
        assert [number for number in range(20) if not store.contains(name(number))] == [4]
    assert kv("drop", "--disk-dir", tmp_path / "d", "--yes")[0] == 0
    assert not list((tmp_path / "d").glob("share-*/segment-*"))
    with BlockStore.open(config) as store:
        assert not store.contains(name(1))
        store.check()


# ── warm ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_is_warmed_from_its_disk_and_from_other_agents(nodes: Nodes, secret: list[str]) -> None:
    a, b = nodes.start("a"), nodes.start("b")
    put(a, range(20))
    cold = [number for number in range(20) if not host_of(a).contains(name(number))][:3]
    asked = ("--kv-index", nodes.url, *secret)
    status, (row,) = rows("warm", *hexes(*cold), "--node", "a", *asked)
    assert (status, row["in_host_memory"]) == (0, 3)
    assert all(host_of(a).contains(name(number)) for number in cold)
    status, (row,) = rows("warm", *hexes(*cold, 99), "--node", "b", *asked)
    assert (status, row["in_host_memory"], row["not_found"], row["not_taken"]) == (3, 3, 1, 0)
    assert b.stats().prefetches["fetched"] == 3
    assert host_of(b).contains(name(cold[0]))
    status, message = kv("warm", *hexes(1), *asked)
    assert (status, "--node" in message) == (1, True)


def test_a_redis_cluster_is_looked_after_alike(tmp_path: Path, secret: list[str]) -> None:
    masters = start_cluster(tmp_path)
    nodes = Nodes(masters[0].url.replace("redis:", "redis+cluster:"), tmp_path)
    try:
        put(nodes.start("a"), range(20))
        dead = nodes.start("dead", OTHER_IDENTITY)
        put(dead, range(20), OTHER_IDENTITY)
        dead.close()
        asked = ("--kv-index", nodes.url)
        found = json.loads(kv("status", *asked, "--json")[1])["identities"]
        assert {(space["weights"], space["blocks"]) for space in found} == {("weights-a", 20), ("weights-b", 20)}
        assert rows("where", name(3).hex()[:8], *asked)[1][0]["places"][0]["node"] == "a"
        assert rows("scrub", *asked, *secret)[1][0]["whole"] == 20
        assert kv("drop", "--identity", OTHER_IDENTITY.digest().hex()[:8], *asked, "--yes")[0] == 0
        found = json.loads(kv("status", *asked, "--json")[1])["identities"]
        assert [space["weights"] for space in found] == ["weights-a"]
    finally:
        nodes.close()
        for master in masters:
            master.kill()


# ── what is wrong is said ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_had_is_said_with_its_cure(nodes: Nodes, tmp_path: Path, secret: list[str]) -> None:
    put(nodes.start("a"), range(2))
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"another secret, as long")
    for arguments, status, words in (
        (("status",), 1, "--kv-index"),
        (("status", "--kv-index", "redis://127.0.0.1:1"), 1, "127.0.0.1:1 does not serve us"),
        (("status", "--kv-index", "http://x"), 1, "URL"),
        (("status", "--disk-dir", tmp_path), 1, "no directory of a KV store"),
        (("status", "--kv-index", nodes.url, "--node", "z"), 1, "Known: a"),
        (("status", "--kv-index", nodes.url, "--identity", "ffffffff"), 1, "Known: "),
        (("where", "--kv-index", nodes.url), 1, "which blocks"),
        (("where", "zz", "--kv-index", nodes.url), 1, "no block hash"),
        (("verify", "--kv-index", nodes.url), 1, "--peer-token-file"),
        (("verify", "--kv-index", nodes.url, "--peer-token-file", wrong), 3, "does not know our secret"),
        (("verify", "--kv-index", nodes.url, "--peer-token-file", tmp_path / "none"), 1, "cannot be read"),
        (("verify", "--kv-index", nodes.url, *secret, "--peer-tls-name", "x"), 1, "--peer-tls-ca"),
    ):
        got, text = kv(*arguments)
        assert got == status, (arguments, text)
        assert words in text, (arguments, text)
        assert "another secret" not in text


def test_a_password_in_the_url_is_not_shown() -> None:
    _, text = kv("status", "--kv-index", "redis://me:hunter2@127.0.0.1:1/0")
    assert "hunter2" not in text
    assert "hunter2" not in repr(RedisConfig("redis://me:hunter2@127.0.0.1:1/0", "a"))


def test_the_commands_start_without_torch() -> None:
    modules = ", ".join(f"spillway.cli.kv_{name}" for name in ("status", "where", "verify", "drop", "warm"))
    program = f"import sys, {modules}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert ended.stdout.strip() == "[]"
