"""ModelDeployments on a real API server and scheduler: pods, gates, nodes, generations. Agents do not run here."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kube import Kube, ours, said
from operated import config

from spillway.operator.cluster import Cluster, Key
from spillway.operator.config import OperatorConfig, RedisSettings
from spillway.operator.deployments import Deployments
from spillway.operator.errors import ClusterError, ConflictError, RefusedError
from spillway.operator.kv_stores import KVStores


class Field:
    """A namespace beside two nodes of one GPU each, and looks at the one deployment in it."""

    def __init__(self, kube: Kube, space: str) -> None:
        self.kube, self.space = kube, space
        self.config: OperatorConfig = config()
        self.now_s = 1_800_000_000.0

    def apply(self, **spec: Any) -> None:
        resources = {"gpus": 1, "cpu": "100m", "memory": "1Gi"}
        self.kube.apply(
            ours("ModelDeployment", "m", **{"model": "/models/m", "resources": resources} | spec), self.space
        )

    def look(self, settings: type[Cluster] = Cluster) -> tuple[float | None, int]:
        """One reconciliation of an operator that was just started: its wake time, and how much it wrote."""

        async def once() -> tuple[float | None, int]:
            async with settings() as cluster:
                stores = KVStores(cluster, RedisSettings(image="redis:test"))
                deployments = Deployments(cluster, self.config, stores, asyncio.Lock())
                wake = await deployments.reconcile(self.space, "m", self.now_s)
                return wake, cluster.writes

        return asyncio.run(once())

    def shelve(self, store: str) -> None:
        """One look at a KVStore."""

        async def once() -> None:
            async with Cluster() as cluster:
                await KVStores(cluster, RedisSettings(image="redis:test")).reconcile(self.space, store, self.now_s)

        asyncio.run(once())

    def look_until_quiet(self) -> None:
        """Until a look writes nothing."""
        for _ in range(20):
            try:
                if self.look()[1] == 0:
                    return
            except ConflictError:  # the scheduler was faster
                continue
        raise AssertionError("a hot loop: twenty looks, and still something to write")

    def pods(self) -> dict[str, Any]:
        found = self.kube.list("Pod", self.space).items()
        return {name: pod for name, pod in found if "spillway.dev/deployment" in pod["metadata"]["labels"]}

    def deployment(self) -> dict[str, Any]:
        return self.kube.get("ModelDeployment", "m", self.space)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.deployment().get("status", {})
        return status

    def set_phase(self, pod: str, phase: str, ready: str = "False") -> None:
        """What a kubelet would say."""
        status = {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]}
        self.kube.patch("Pod", pod, self.space, {"status": status}, "/status")

    def lose(self, pod: str) -> None:
        """What a node controller would do."""
        self.kube.delete("Pod", pod, self.space, gracePeriodSeconds=0)


@pytest.fixture
def field(nodes: Kube, space: str) -> Iterator[Field]:
    return Field(nodes, space)


def test_pods_wait_at_their_gates_until_nodes_are_chosen(field: Field) -> None:
    field.apply(replicas=2)
    field.look()
    made = field.pods()
    assert {name: bool(pod["spec"].get("schedulingGates")) for name, pod in made.items()} == {
        "m-0-1": True,
        "m-1-1": True,
    }
    field.look()
    field.look_until_quiet()
    nodes = {name: agents_node(pod) for name, pod in field.pods().items()}
    assert set(nodes) == {"m-0-1", "m-1-1"}
    assert set(nodes.values()) == {"gpu-a", "gpu-b"}
    assert not any(pod["spec"].get("schedulingGates") for pod in field.pods().values())
    assert field.kube.get("Service", "m-agents", field.space)["spec"]["clusterIP"] == "None"


def agents_node(pod: dict[str, Any]) -> str:
    affinity = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    name: str = affinity["nodeSelectorTerms"][0]["matchFields"][0]["values"][0]
    return name


def test_without_room_the_gate_stays_and_the_status_says_what_is_missing(field: Field) -> None:
    field.apply(replicas=3)
    field.look_until_quiet()
    gated = [name for name, pod in field.pods().items() if pod["spec"].get("schedulingGates")]
    assert len(gated) == 1
    placed = said(field.deployment(), "Placed")
    assert placed["status"] == "False"
    assert "needs 1 GPU and 1 GiB on one node; the largest free is no GPU" in placed["message"]
    assert field.look() == (field.now_s + 10.0, 0)


def test_a_lost_agent_is_followed_by_the_next_generation(field: Field) -> None:
    field.apply()
    field.look_until_quiet()
    field.set_phase("m-0-1", "Running", "True")
    field.look_until_quiet()
    assert field.status()["readyReplicas"] == 1
    field.set_phase("m-0-1", "Failed")
    field.look()
    field.lose("m-0-1")
    wake, _ = field.look()
    assert wake is not None
    assert field.pods() == {}, "it rests after a failure"
    field.now_s = wake
    field.look_until_quiet()
    assert set(field.pods()) == {"m-0-2"}
    assert field.status()["groups"][0]["generation"] == 2


class DiesAtWrite(Cluster):
    """The process ends at its n-th write, before or after the server has it."""

    at = 0
    after = False

    async def _call(self, method: str, path: str, *rest: Any, **more: Any) -> dict[str, Any]:
        if method == "GET":
            return await super()._call(method, path, *rest, **more)
        if self.writes > self.at:
            if self.after:
                await super()._call(method, path, *rest, **more)
            raise ClusterError("killed")
        return await super()._call(method, path, *rest, **more)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_and_started_again_doubles_nothing(field: Field, after: bool) -> None:
    field.apply(replicas=2)
    for at in (0, 1, 2, 3, 0, 1):
        DiesAtWrite.at, DiesAtWrite.after = at, after
        try:
            field.look(DiesAtWrite)
        except ClusterError:
            continue
    field.look_until_quiet()
    groups = sorted(pod["metadata"]["labels"]["spillway.dev/group"] for pod in field.pods().values())
    assert groups == ["0", "1"]
    told = {f"m-{each['index']}-{each['generation']}" for each in field.status()["groups"]}
    assert told == set(field.pods())


def test_deleted_it_takes_everything_along(field: Field) -> None:
    field.apply()
    field.look_until_quiet()
    field.kube.delete("ModelDeployment", "m", field.space)
    field.kube.wait(lambda: all("deletionTimestamp" in each["metadata"] for each in field.pods().values()), "pods go")
    field.kube.wait(lambda: not field.kube.find("Service", "m-agents", field.space), "the service goes")
    assert field.look() == (None, 0)


def test_what_cannot_run_yet_is_said_and_nothing_is_made(field: Field) -> None:
    field.apply(parallelism={"tensor": 2})
    field.look_until_quiet()
    assert field.pods() == {}
    ready = said(field.deployment(), "Ready")
    assert (ready["reason"], ready["status"]) == ("NotSupported", "False")
    assert "over 2 ranks is not supported yet" in ready["message"]


def test_an_object_changed_since_it_was_read_is_a_conflict(field: Field) -> None:
    field.apply()
    field.look()

    async def stale() -> None:
        async with Cluster() as cluster:
            patch = {"metadata": {"resourceVersion": "1"}, "spec": {"schedulingGates": []}}
            await cluster.merge(Key("Pod", field.space, "m-0-1"), patch)

    with pytest.raises(ConflictError):
        asyncio.run(stale())


def secret(field: Field, name: str) -> dict[str, str]:
    found = field.kube.find("Secret", name, field.space)
    return {} if found is None else {key: base64.b64decode(value).decode() for key, value in found["data"].items()}


def test_agents_get_tokens_and_what_replaces_them(field: Field, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    field.config = config(agents={}).model_copy(
        update={"gateway": field.config.gateway.model_copy(update={"agent_token_file": tmp_path / "token"})}
    )
    field.apply()
    field.look_until_quiet()
    assert secret(field, "m-agents") == {"token": "first"}
    (tmp_path / "token").write_text("second\n")
    field.look_until_quiet()
    assert secret(field, "m-agents") == {"token": "second"}
    assert set(field.pods()) == {"m-0-1"}, "the kubelet replaces the file; nothing starts again"


def test_agents_wait_for_their_kv_store_and_outlive_it(field: Field) -> None:
    field.apply(kv={"host": "64Mi"}, kvStore={"name": "blocks"})
    field.look_until_quiet()
    assert all(pod["spec"].get("schedulingGates") for pod in field.pods().values())
    assert said(field.deployment(), "Ready")["message"] == "0 of 1 groups are ready; the KVStore blocks does not exist"
    field.kube.apply(ours("KVStore", "blocks", managed={}), field.space)
    field.shelve("blocks")
    field.look_until_quiet()
    assert not any(pod["spec"].get("schedulingGates") for pod in field.pods().values())
    store = secret(field, "blocks-redis") | secret(field, "blocks-peers")
    assert secret(field, "m-agents") == {"kv-index": store["url"], "peer-token": store["peer-token"]}
    field.kube.delete("KVStore", "blocks", field.space)
    field.look_until_quiet()
    assert set(field.pods()) == {"m-0-1"}
    assert said(field.deployment(), "BlocksShared")["status"] == "False"


def test_certificates_are_waited_for_and_the_authority_is_handed_on(field: Field) -> None:
    blank = {"apiVersion": "v1", "kind": "Secret"}
    url = {"url": "rediss://:hidden@r.example/0\n", "ca.crt": "authority"}
    field.kube.create(blank | {"metadata": {"name": "redis"}, "stringData": url}, field.space)
    field.kube.create(ours("KVStore", "blocks", external={"urlSecret": {"name": "redis"}}), field.space)
    field.shelve("blocks")
    field.apply(kv={"host": "64Mi"}, kvStore={"name": "blocks", "peerTls": {"secretName": "peers"}})
    field.look_until_quiet()
    assert all(pod["spec"].get("schedulingGates") for pod in field.pods().values())
    assert said(field.deployment(), "Ready")["message"].endswith(
        "the Secret peers does not exist, or has no key tls.crt"
    )
    files = {"tls.crt": "certificate", "tls.key": "key", "ca.crt": "authority"}
    field.kube.create(blank | {"metadata": {"name": "peers"}, "stringData": files}, field.space)
    field.look_until_quiet()
    (pod,) = field.pods().values()
    assert not pod["spec"].get("schedulingGates")
    held = secret(field, "m-agents")
    assert held["kv-index-ca.crt"] == "authority"
    assert held["kv-index"] == "rediss://:hidden@r.example/0?ssl_ca_certs=/etc/spillway/kv-index-ca.crt"


def test_a_name_that_serves_another_model_elsewhere_is_refused(field: Field) -> None:
    other = ours("ModelDeployment", "m", model="/models/other", replicas=0)
    elder = field.kube.apply(other, "default")["metadata"]["creationTimestamp"]
    try:
        field.kube.wait(lambda: made_after(field, elder), "a later second")
        field.look_until_quiet()
        assert field.pods() == {}
        assert "default/m, which has another model" in said(field.deployment(), "Ready")["message"]
    finally:
        field.kube.delete("ModelDeployment", "m", "default")
    field.look_until_quiet()
    assert set(field.pods()) == {"m-0-1"}


def made_after(field: Field, elder: str) -> bool:
    """Ages are told in seconds."""
    field.kube.delete("ModelDeployment", "m", field.space)
    field.apply()
    created: str = field.deployment()["metadata"]["creationTimestamp"]
    return created > elder


def test_what_the_cluster_refuses_is_told(field: Field) -> None:
    label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    field.kube.patch("Namespace", field.space, "", label)
    field.config = config(agents={"volumes": [{"name": "torch", "hostPath": {"path": "/opt"}}]})
    field.apply()
    for _ in range(3):
        with pytest.raises(RefusedError):
            field.look()
    ready = said(field.deployment(), "Ready")
    assert ready["reason"] == "Refused"
    assert "restricted volume types" in ready["message"]
    told = field.kube.call("GET", f"api/v1/namespaces/{field.space}/events")["items"]
    assert [each["reason"] for each in told if each["involvedObject"]["name"] == "m"].count("Refused") == 1, "once"
    label["metadata"]["labels"] = {"pod-security.kubernetes.io/enforce": None}
    field.kube.patch("Namespace", field.space, "", label)
    field.look_until_quiet()
    assert said(field.deployment(), "Ready")["reason"] == "NotReady"
