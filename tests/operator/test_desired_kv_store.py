"""What a KVStore becomes, and that the Redis it starts is the one that is described."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority

from spillway.api.resources import Condition, KVStore
from spillway.operator.config import RedisSettings
from spillway.operator.desired.conditions import Finding, conditions
from spillway.operator.desired.kv_store import (
    authority_secret,
    external_endpoint,
    objects,
    secret,
    trusting,
    url_secret,
)

PASSWORD = "not-a-secret-in-a-test"
IMAGE = RedisSettings(image="redis:8")


def store(**spec: Any) -> KVStore:
    metadata = {"name": "blocks", "namespace": "team", "uid": "u-1", "resourceVersion": "7"}
    return KVStore.read({"metadata": metadata, "spec": spec})


def test_an_external_store_needs_nothing_but_its_secret() -> None:
    external = store(external={"urlSecret": {"name": "redis", "key": "address"}})
    assert objects(external, IMAGE) == []
    assert url_secret(external) == ("redis", "address")


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("redis://user:secret@r.example:7000/2", "redis://r.example:7000/2"),
        ("rediss://:secret@r.example", "rediss://r.example:6379"),
        ("rediss+cluster://:secret@r.example", "rediss+cluster://r.example:6379"),
        ("redis://:secret@[fd00::1]:6380/0", "redis://[fd00::1]:6380/0"),
        ("https://r.example", None),
        ("redis://", None),
        ("redis://r.example:port", None),
    ],
)
def test_an_endpoint_has_no_credentials(url: str, endpoint: str | None) -> None:
    assert external_endpoint(url) == endpoint


def test_agents_find_a_managed_store_through_its_secret() -> None:
    managed = store(managed={})
    made = secret(managed, PASSWORD)
    assert (made["metadata"]["name"], "url") == url_secret(managed)
    service = objects(managed, IMAGE)[0]
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
    assert made["stringData"]["url"] == f"redis://:{PASSWORD}@{host}:{service['spec']['ports'][0]['port']}/0"


@pytest.mark.parametrize(
    "spec", [{}, {"storage": "1Gi"}, {"storage": "1Gi", "storageClassName": "fast"}, {"tls": {"secretName": "c"}}]
)
def test_every_mount_has_its_volume_and_every_object_its_owner(spec: dict[str, Any]) -> None:
    made = objects(store(managed=spec), IMAGE)
    stateful = made[1]["spec"]
    pod = stateful["template"]["spec"]
    volumes = {each["name"] for each in pod["volumes"]}
    claims = stateful.get("volumeClaimTemplates", [])
    assert {each["name"] for each in pod["containers"][0]["volumeMounts"]} == volumes | {
        each["metadata"]["name"] for each in claims
    }
    assert [each["spec"].get("storageClassName") for each in claims] == [spec.get("storageClassName")] * len(claims)
    assert bool(claims) == ("storage" in spec)
    assert (
        stateful["selector"]["matchLabels"] == stateful["template"]["metadata"]["labels"] == made[0]["spec"]["selector"]
    )
    assert {each["metadata"]["ownerReferences"][0]["uid"] for each in made} == {"u-1"}


def test_over_tls_agents_trust_the_authority_that_is_given() -> None:
    managed, external = store(managed={"tls": {"secretName": "cert"}}), store(external={"urlSecret": {"name": "redis"}})
    assert (authority_secret(store(managed={})), authority_secret(managed)) == (None, "cert")
    assert authority_secret(external) == "redis"
    address = secret(managed, PASSWORD)["stringData"]["url"]
    assert (
        trusting(address.encode(), "/ca").decode()
        == f"rediss://:{PASSWORD}@blocks-redis.team.svc:6379/0?ssl_ca_certs=/ca"
    )
    for said in (b"redis://r:1/0", b"rediss://r:1/0?ssl_ca_certs=/mine"):
        assert trusting(said, "/ca") == said
    assert trusting(b"rediss://r:1/0?db=1", "/ca") == b"rediss://r:1/0?db=1&ssl_ca_certs=/ca"


def test_the_password_stands_in_the_secret_alone() -> None:
    managed = store(managed={})
    assert PASSWORD not in json.dumps(objects(managed, IMAGE))


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server on PATH")
@pytest.mark.parametrize(
    "spec",
    [{"memory": "64Mi"}, {"memory": "64Mi", "storage": "1Gi"}, {"memory": "64Mi", "tls": {"secretName": "cert"}}],
)
def test_the_container_s_command_starts_that_redis(tmp_path: Path, spec: dict[str, Any]) -> None:
    container = objects(store(managed=spec), IMAGE)[1]["spec"]["template"]["spec"]["containers"][0]
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "tls").mkdir()
    authority = Authority(tmp_path / "tls", "ca")
    pair = authority.certify("tls")
    for made, key in ((pair.certificate, "tls.crt"), (pair.key, "tls.key"), (authority.certificate, "ca.crt")):
        made.rename(tmp_path / "tls" / key)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = {
        "6379": str(port),
        "dir /data": f"dir {tmp_path}",
        "/secret/": f"{tmp_path}/",
        "/run/redis/": f"{tmp_path}/",
    }
    places["/tls/"] = f"{tmp_path}/tls/"

    def here(text: str) -> str:
        for there, place in places.items():
            text = text.replace(there, place)
        return text

    settings, command = here(container["env"][0]["value"]), here(container["command"][2])
    check = ["sh", "-c", here(container["readinessProbe"]["exec"]["command"][2])]
    environment = {"PATH": os.environ["PATH"], "SETTINGS": settings}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(["sh", "-c", command], env=environment, stdout=log, stderr=log)

    def ask(*words: str, password: str = PASSWORD) -> str:
        secure = ["--tls", "--cacert", f"{tmp_path}/tls/ca.crt"] if "tls" in spec else []
        client = ["redis-cli", "-p", str(port), *secure, *words]
        return subprocess.run(
            client, env={**environment, "REDISCLI_AUTH": password}, capture_output=True, text=True, check=False
        ).stdout.strip()

    try:
        give_up = time.monotonic() + 60
        while subprocess.run(check, env=environment, capture_output=True, check=False).returncode != 0:
            assert time.monotonic() < give_up, (tmp_path / "log").read_text()
            time.sleep(0.05)
        assert "maxmemory\n67108864" in ask("config", "get", "maxmemory")
        assert ask("config", "get", "appendonly").endswith("yes" if "storage" in spec else "no")
        assert "NOAUTH" in ask("ping", password="")
        server.terminate()  # what the kubelet sends must reach Redis itself
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait(60)


def test_saying_the_same_again_changes_nothing() -> None:
    finding = Finding("Ready", False, "Waiting", "needs 1 GPU and 4 GiB on one node; the largest free is no GPU (a)")
    first = conditions([finding], (), 1, "2026-01-01T00:00:00Z")
    assert conditions([finding], first, 1, "2026-01-01T00:05:00Z") == first
    changed = conditions([Finding("Ready", True, "Ready", "")], first, 1, "2026-01-01T00:06:00Z")
    assert changed == (
        Condition(
            type="Ready",
            status="True",
            reason="Ready",
            last_transition_time="2026-01-01T00:06:00Z",
            observed_generation=1,
        ),
    )
