"""ModelDeployments on a real API server and scheduler: pods, gates, nodes, generations. Agents do not run here."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testcluster.control_plane import ControlPlane

from spillway.operator.cluster import Cluster, Key
from spillway.operator.deployments import Deployments
from spillway.operator.desired import agents
from spillway.operator.desired.deployment_status import rfc3339
from spillway.operator.errors import ClusterError, ConflictError

CRDS = Path(__file__).parents[2] / "manifests" / "crds"
SETTINGS = agents.AgentSettings(image="spillway-agent:test", gateway="spillway-gateway:7400")
SPACE = "deployments"
NODES = ("gpu-a", "gpu-b")


class Field:
    """A namespace with two nodes of one GPU each, and looks at the one deployment in it."""

    def __init__(self, server: ControlPlane) -> None:
        self.server = server
        self.now_s = 1_800_000_000.0

    def apply(self, **spec: Any) -> None:
        manifest = {"apiVersion": "spillway.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "m"}}
        resources = {"gpus": 1, "cpu": "100m", "memory": "1Gi"}
        self._put(manifest | {"spec": {"model": "/models/m", "resources": resources} | spec})

    def _put(self, manifest: dict[str, Any]) -> None:
        words = ("apply", "--server-side", "--force-conflicts", "-n", SPACE, "-f", "-")
        self.server.kubectl(*words, stdin=json.dumps(manifest))

    def look(self, settings: type[Cluster] = Cluster) -> tuple[float | None, int]:
        """One reconciliation of an operator that was just started: its wake time, and how much it wrote."""

        async def once() -> tuple[float | None, int]:
            async with settings() as cluster:
                wake = await Deployments(cluster, SETTINGS, asyncio.Lock()).reconcile(SPACE, "m", self.now_s)
                return wake, cluster.writes

        return asyncio.run(once())

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
        listed = json.loads(self.server.kubectl("get", "pods", "-n", SPACE, "-o", "json"))
        return {each["metadata"]["name"]: each for each in listed["items"]}

    def status(self) -> dict[str, Any]:
        found = json.loads(self.server.kubectl("get", "mdep", "m", "-n", SPACE, "-o", "json"))
        status: dict[str, Any] = found.get("status", {})
        return status

    def set_phase(self, pod: str, phase: str, ready: str = "False") -> None:
        """What a kubelet would say."""
        status = {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]}
        words = ("patch", "pod", pod, "-n", SPACE, "--subresource=status", "--type=merge", "-p")
        self.server.kubectl(*words, json.dumps({"status": status}))


@pytest.fixture(scope="module")
def server(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    control_plane.kubectl("apply", "--server-side", "-f", str(CRDS))
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(CRDS))
    for name in NODES:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        control_plane.kubectl("create", "-f", "-", stdin=json.dumps(node))
    stopped = threading.Event()
    heart = threading.Thread(target=beat, args=(control_plane, stopped))
    heart.start()
    control_plane.wait(lambda: untainted(control_plane), "the nodes are ready")
    former = os.environ.get("KUBECONFIG")
    os.environ["KUBECONFIG"] = str(control_plane.kubeconfig)
    yield control_plane
    if former is None:
        del os.environ["KUBECONFIG"]
    else:
        os.environ["KUBECONFIG"] = former
    stopped.set()
    heart.join()
    control_plane.kubectl("delete", "node", *NODES)


def beat(server: ControlPlane, stopped: threading.Event) -> None:
    """Says that the nodes are ready, as kubelets would: who falls silent loses its pods."""
    offered = {"cpu": "4", "memory": "8Gi", "pods": "20", "nvidia.com/gpu": "1"}
    while True:
        ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": rfc3339(time.time())[:19] + "Z"}
        status = {"capacity": offered, "allocatable": offered, "conditions": [ready]}
        patch = json.dumps({"status": status})
        server.kubectl("patch", "node", *NODES, "--subresource=status", "--type=merge", "-p", patch)
        if stopped.wait(4.0):
            return


def untainted(server: ControlPlane) -> bool:
    return server.kubectl("get", "nodes", "-o", "jsonpath={.items[*].spec.taints}") == ""


@pytest.fixture
def field(server: ControlPlane) -> Iterator[Field]:
    server.kubectl("create", "namespace", SPACE)
    yield Field(server)
    server.kubectl("delete", "pods", "--all", "-n", SPACE, "--grace-period=0", "--force")
    server.kubectl("delete", "namespace", SPACE, "--timeout=100s")


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
    assert field.server.kubectl("get", "service", "m-agents", "-n", SPACE, "-o", "jsonpath={.spec.clusterIP}") == "None"


def agents_node(pod: dict[str, Any]) -> str:
    affinity = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    name: str = affinity["nodeSelectorTerms"][0]["matchFields"][0]["values"][0]
    return name


def test_without_room_the_gate_stays_and_the_status_says_what_is_missing(field: Field) -> None:
    field.apply(replicas=3)
    field.look_until_quiet()
    gated = [name for name, pod in field.pods().items() if pod["spec"].get("schedulingGates")]
    assert len(gated) == 1
    said = {each["type"]: each for each in field.status()["conditions"]}
    assert said["Placed"]["status"] == "False"
    assert "needs 1 GPU and 1 GiB on one node; the largest free is no GPU" in said["Placed"]["message"]
    assert field.look() == (field.now_s + 10.0, 0)


def test_a_lost_agent_is_followed_by_the_next_generation(field: Field) -> None:
    field.apply()
    field.look_until_quiet()
    field.set_phase("m-0-1", "Running", "True")
    field.look_until_quiet()
    assert field.status()["readyReplicas"] == 1
    field.set_phase("m-0-1", "Failed")
    field.look()
    field.server.kubectl("delete", "pod", "m-0-1", "-n", SPACE, "--grace-period=0", "--force", "--ignore-not-found")
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
    field.server.kubectl("delete", "mdep", "m", "-n", SPACE)
    field.server.wait(lambda: all("deletionTimestamp" in each["metadata"] for each in field.pods().values()), "pods go")
    words = ("get", "service", "-n", SPACE, "-o", "name")
    field.server.wait(lambda: field.server.kubectl(*words) == "", "the service goes")
    assert field.look() == (None, 0)


def test_what_cannot_run_yet_is_said_and_nothing_is_made(field: Field) -> None:
    field.apply(parallelism={"tensor": 2})
    field.look_until_quiet()
    assert field.pods() == {}
    (said,) = field.status()["conditions"]
    assert (said["reason"], said["status"]) == ("NotSupported", "False")
    assert "over 2 ranks is not supported yet" in said["message"]


def test_an_object_changed_since_it_was_read_is_a_conflict(field: Field) -> None:
    field.apply()
    field.look()

    async def stale() -> None:
        async with Cluster() as cluster:
            patch = {"metadata": {"resourceVersion": "1"}, "spec": {"schedulingGates": []}}
            await cluster.merge(Key("Pod", SPACE, "m-0-1"), patch)

    with pytest.raises(ConflictError):
        asyncio.run(stale())
