"""KVStores on a real API server: the Redis behind them, a password that is made once, endpoints without credentials."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from kube import Kube, Manifest, ours, said

from spillway.operator.cluster import Cluster
from spillway.operator.config import RedisSettings
from spillway.operator.errors import ClusterError
from spillway.operator.kv_stores import KVStores


class Shelf:
    """The KVStore `s` of a namespace, looked at by operators that were just started."""

    def __init__(self, kube: Kube, space: str) -> None:
        self.kube, self.space = kube, space
        self.now_s = 1_800_000_000.0

    def apply(self, **spec: Any) -> None:
        self.kube.apply(ours("KVStore", "s", **spec), self.space)

    def look(self, cluster: type[Cluster] = Cluster) -> tuple[float | None, int]:
        async def once() -> tuple[float | None, int]:
            async with cluster() as opened:
                stores = KVStores(opened, RedisSettings(image="redis:test"))
                return await stores.reconcile(self.space, "s", self.now_s), opened.writes

        return asyncio.run(once())

    def store(self) -> Manifest:
        return self.kube.get("KVStore", "s", self.space)

    def redis(self) -> Manifest:
        return self.kube.get("StatefulSet", "s-redis", self.space)

    def secrets(self) -> dict[str, Any]:
        return {name: each["data"] for name, each in self.kube.list("Secret", self.space).items()}


@pytest.fixture
def shelf(kube: Kube, space: str) -> Shelf:
    return Shelf(kube, space)


def test_a_managed_store_gets_its_redis(shelf: Shelf) -> None:
    shelf.apply(managed={"memory": "1024Mi", "storage": "1Gi"})
    assert shelf.look() == (None, 6), "two Secrets, Service, StatefulSet, status, and an event of it"
    assert shelf.look() == (None, 0), "and then nothing, however the server writes amounts"
    assert set(shelf.secrets()) == {"s-redis", "s-peers"}
    assert shelf.kube.get("Service", "s-redis", shelf.space)["spec"]["clusterIP"] == "None"
    assert shelf.redis()["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "1Gi"
    told = shelf.store()
    assert told["status"]["endpoint"] == f"redis://s-redis.{shelf.space}.svc:6379/0"
    assert "does not answer yet" in said(told, "Ready")["message"]
    shelf.kube.wait(lambda: shelf.kube.find("Pod", "s-redis-0", shelf.space), "its pod is made")
    status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}  # as a kubelet would say
    shelf.kube.patch("Pod", "s-redis-0", shelf.space, {"status": status}, "/status")
    shelf.kube.wait(lambda: shelf.redis()["status"].get("readyReplicas"), "the controller has heard of it")
    shelf.look()
    assert said(shelf.store(), "Ready")["status"] == "True"


def test_the_password_is_made_once_and_told_nowhere_else(shelf: Shelf) -> None:
    shelf.apply(managed={})
    shelf.look()
    made = shelf.secrets()
    shelf.apply(managed={"memory": "512Mi"})
    shelf.look()
    assert shelf.secrets() == made
    password = made["s-redis"]["password"]
    assert password not in json.dumps([shelf.store(), shelf.redis()])


def test_what_others_change_is_put_right(shelf: Shelf) -> None:
    shelf.apply(managed={})
    shelf.look()
    shelf.kube.patch("StatefulSet", "s-redis", shelf.space, {"spec": {"replicas": 0}})
    assert shelf.look() == (None, 1)
    assert shelf.redis()["spec"]["replicas"] == 1
    shelf.kube.delete("Service", "s-redis", shelf.space)
    shelf.look()
    assert shelf.kube.find("Service", "s-redis", shelf.space) is not None


class DiesAtWrite(Cluster):
    """The process ends at its n-th write, once the server has it."""

    at = 0

    async def _call(self, method: str, path: str, *rest: Any, **more: Any) -> dict[str, Any]:
        answer = await super()._call(method, path, *rest, **more)
        if method != "GET" and self.writes > self.at:
            raise ClusterError("killed")
        return answer


def test_killed_at_any_write_it_keeps_its_password(shelf: Shelf) -> None:
    shelf.apply(managed={})
    passwords = set()
    for at in range(5):
        DiesAtWrite.at = 0
        with pytest.raises(ClusterError):
            shelf.look(DiesAtWrite)
        passwords |= {each["password"] for name, each in shelf.secrets().items() if name == "s-redis"}
        assert len(shelf.secrets()) == min(at + 1, 2)
    assert shelf.look() == (None, 0)
    assert len(passwords) == 1


def test_an_external_store_waits_for_its_secret(shelf: Shelf) -> None:
    shelf.apply(external={"urlSecret": {"name": "redis"}})
    assert shelf.look()[0] == shelf.now_s + 10
    assert said(shelf.store(), "Ready")["message"] == "the Secret redis does not exist, or has no key url"
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "redis"}}
    shelf.kube.apply(secret | {"stringData": {"url": "https://user:hidden@r.example"}}, shelf.space)
    shelf.look()
    assert "is not a redis:// or rediss:// URL" in said(shelf.store(), "Ready")["message"]
    shelf.kube.apply(secret | {"stringData": {"url": "rediss://user:hidden@r.example:7000/1"}}, shelf.space)
    assert shelf.look()[0] is None
    told = shelf.store()
    assert (told["status"]["endpoint"], said(told, "Ready")["status"]) == ("rediss://r.example:7000/1", "True")
    assert "hidden" not in json.dumps(told["status"])
    assert shelf.kube.list("StatefulSet", shelf.space) == {}


def test_deleted_it_takes_everything_along(shelf: Shelf) -> None:
    shelf.apply(managed={})
    shelf.look()
    shelf.kube.delete("KVStore", "s", shelf.space)
    shelf.kube.wait(lambda: not shelf.secrets() and not shelf.kube.list("StatefulSet", shelf.space), "all of it goes")
    assert shelf.look() == (None, 0)


def test_a_secret_of_somebody_else_is_left_alone(shelf: Shelf) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s-redis"}, "stringData": {"mine": "x"}}
    shelf.kube.create(secret, shelf.space)
    shelf.apply(managed={})
    with pytest.raises(ClusterError, match="the Secret s-redis exists and is not ours"):
        shelf.look()
    assert set(shelf.secrets()["s-redis"]) == {"mine"}
