"""A Redis that speaks only TLS, and lets its users do no more than they must."""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import pytest
from certificates import Authority
from kv_factories import IDENTITY, name
from redis_servers import free_port
from typer.testing import CliRunner

from spillway.cli.main import app
from spillway.kvstore.index.base import PEER
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig

redis = pytest.importorskip("redis")

AGENT_MAY = (
    "~{spillway:v2:* +eval +evalsha +hget +hset +hdel +hincrby +hgetall +sadd +srem +scard +sscan +srandmember +get "
    "+set +pttl +unlink +time"
)
"""As kvstore/README.md says."""
PERSON_MAY = f"{AGENT_MAY} +ping +scan +hvals +hkeys +smembers +script|load"
CHAIN = [name(number) for number in range(40)]
PATIENCE_S = 60


@dataclass
class Secured:
    port: int
    authority: Path

    def url(self, user: str, password: str) -> str:
        return f"rediss://{user}:{password}@127.0.0.1:{self.port}/0?ssl_ca_certs={self.authority}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    program = which("redis-server")
    if program is None:
        pytest.skip("no redis-server on PATH")
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    authority = Authority(folder)
    pair = authority.certify("redis")
    (folder / "redis.conf").write_text(
        f"""port 0
tls-port {port}
bind 127.0.0.1
save ""
dir {folder}
tls-cert-file {pair.certificate}
tls-key-file {pair.key}
tls-ca-cert-file {authority.certificate}
tls-auth-clients no
user default off
user agent on >agents-password {AGENT_MAY}
user person on >persons-password {PERSON_MAY}
"""
    )
    server = Secured(port, authority.certificate)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([program, str(folder / "redis.conf")], stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                with redis.Redis.from_url(server.url("person", "persons-password")) as client:
                    client.ping()
            except redis.exceptions.RedisError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
            else:
                break
        yield server
    finally:
        process.kill()
        process.wait()


def open_node(url: str, node: str) -> RedisIndex:
    return RedisIndex(RedisConfig(url, node, f"{node}:1", lease_s=2.0, near_s=0.0, timeout_s=0.5), IDENTITY.digest())


def test_the_index_works_over_tls_with_the_rights_of_an_agent(secured: Secured) -> None:
    url = secured.url("agent", "agents-password")
    a, b = open_node(url, "a"), open_node(url, "b")
    a.publish("host", CHAIN)
    a.withdraw("host", CHAIN[30:])
    assert a.settle(PATIENCE_S)
    assert b.longest_prefix(CHAIN, (PEER,)) == 30
    assert all(b.locate(CHAIN[:30]))
    a.close()
    deadline = time.monotonic() + PATIENCE_S
    while b.stats().writer.get("cleaned", 0) < 30:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert a.stats().calls.get("failed", 0) == b.stats().calls.get("failed", 0) == 0
    b.close()


@pytest.mark.parametrize("wrong", ["password", "authority"])
def test_who_is_not_let_in_goes_on_alone(secured: Secured, tmp_path: Path, wrong: str) -> None:
    url = secured.url("agent", "guessed-password")
    if wrong == "authority":
        url = Secured(secured.port, Authority(tmp_path).certificate).url("agent", "agents-password")
    index = open_node(url, "c")
    index.publish("host", CHAIN[:3])
    assert index.longest_prefix(CHAIN, ("host", PEER)) == 3
    deadline = time.monotonic() + PATIENCE_S
    while not index.stats().calls.get("failed", 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not index.stats().held
    index.close()


def test_people_look_and_drop_with_theirs(secured: Secured) -> None:
    a = open_node(secured.url("agent", "agents-password"), "gone")
    a.publish("disk", CHAIN[:7])
    assert a.settle(PATIENCE_S)
    person = ["--kv-index", secured.url("person", "persons-password")]
    shown = CliRunner().invoke(app, ["kv", "status", *person])
    assert shown.exit_code == 0, shown.exception
    assert "gone" in shown.output
    assert CliRunner().invoke(app, ["kv", "where", CHAIN[3].hex()[:10], *person]).exit_code == 0
    a.close()
    dropped = CliRunner().invoke(app, ["kv", "drop", "--node", "gone", "--yes", *person])
    assert dropped.exit_code == 0, (dropped.output, dropped.exception)
    assert "7 entries deleted" in dropped.output
    assert "persons-password" not in shown.output + dropped.output
