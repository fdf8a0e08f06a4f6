"""The whole cluster is real: pods run on every node, reach each other by address and by name; faults are noticed."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from testcluster.cluster import Cluster
from testcluster.errors import ClusterError
from testcluster.images import PODLING

pytestmark = pytest.mark.e2e

_EVERYWHERE = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "web"},
    "spec": {
        "selector": {"matchLabels": {"app": "web"}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {
                "containers": [
                    {
                        "name": "web",
                        "image": PODLING,
                        "imagePullPolicy": "Never",
                        "args": ["serve", ":8080"],
                        "resources": {"limits": {"nvidia.com/gpu": "1"}},
                    }
                ],
                "terminationGracePeriodSeconds": 1,
            },
        },
    },
}
_SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
}


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> Iterator[dict[str, tuple[str, str]]]:
    """Node → (name, address) of the pod of the service `web` that runs there."""
    kubectl = cluster.control_plane.kubectl
    everything = {"apiVersion": "v1", "kind": "List", "items": [_EVERYWHERE, _SERVICE]}
    kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
    kubectl("create", "-f", "-", stdin=json.dumps(everything))
    kubectl("rollout", "status", "daemonset/web", "--timeout=110s")
    found = json.loads(kubectl("get", "pods", "-l", "app=web", "-o", "json"))["items"]
    yield {pod["spec"]["nodeName"]: (pod["metadata"]["name"], pod["status"]["podIP"]) for pod in found}
    kubectl("delete", "daemonset/web", "service/web", "--cascade=foreground")


def _get(cluster: Cluster, pod: str, url: str) -> str:
    return cluster.control_plane.kubectl("exec", pod, "--", "/podling", "get", url).strip()


def _get_in_time(cluster: Cluster, pod: str, url: str) -> str:
    """What it answers once every node has heard of what changed: services and routes follow a little later."""
    said: list[str] = []

    def answered() -> bool:
        with contextlib.suppress(ClusterError):
            said.append(_get(cluster, pod, url))
        return bool(said)

    cluster.control_plane.wait(answered, f"{pod} reaches {url}")
    return said[0]


def _wait_not_ready(cluster: Cluster, node: str) -> None:
    cluster.control_plane.kubectl("wait", "--for=condition=Ready=Unknown", f"node/{node}", "--timeout=90s")


def test_every_node_runs_a_pod_and_each_pod_reaches_the_next(
    cluster: Cluster, pods: dict[str, tuple[str, str]]
) -> None:
    assert set(pods) == {"n1", "n2", "n3"}
    ring = list(pods.values())
    for (caller, _), (name, address) in zip(ring, ring[1:] + ring[:1], strict=True):
        assert _get_in_time(cluster, caller, f"http://{address}:8080/") == name


def test_a_service_answers_by_its_name_from_every_node(cluster: Cluster, pods: dict[str, tuple[str, str]]) -> None:
    names = {name for name, _ in pods.values()}
    for caller in names:
        assert _get_in_time(cluster, caller, "http://web.default.svc.cluster.local/") in names


def test_pretended_gpus_are_counted_out(cluster: Cluster, pods: dict[str, tuple[str, str]]) -> None:
    node = json.loads(cluster.control_plane.kubectl("get", "node", "n1", "-o", "json"))
    assert node["status"]["allocatable"]["nvidia.com/gpu"] == "2"


def test_a_node_that_is_cut_off_is_noticed_and_comes_back_with_its_pod(
    cluster: Cluster, pods: dict[str, tuple[str, str]]
) -> None:
    cluster.nodes["n2"].cut_off()
    with pytest.raises(ClusterError):
        _get(cluster, pods["n1"][0], f"http://{pods['n2'][1]}:8080/")
    _wait_not_ready(cluster, "n2")
    cluster.nodes["n2"].bring_back()
    cluster.wait_ready("n2")
    assert _get_in_time(cluster, pods["n1"][0], f"http://{pods['n2'][1]}:8080/") == pods["n2"][0]


def test_a_frozen_node_is_noticed_and_thaws(cluster: Cluster, pods: dict[str, tuple[str, str]]) -> None:
    cluster.nodes["n3"].freeze()
    _wait_not_ready(cluster, "n3")
    cluster.nodes["n3"].thaw()
    cluster.wait_ready("n3")
    assert _get_in_time(cluster, pods["n1"][0], f"http://{pods['n3'][1]}:8080/") == pods["n3"][0]


def test_a_killed_node_boots_again_and_runs_its_pod(cluster: Cluster, pods: dict[str, tuple[str, str]]) -> None:
    cluster.nodes["n3"].kill()
    _wait_not_ready(cluster, "n3")
    cluster.nodes["n3"].start()
    cluster.wait_ready("n3")
    kubectl = cluster.control_plane.kubectl
    kubectl("rollout", "status", "daemonset/web", "--timeout=110s")
    running = kubectl("get", "pods", "-l", "app=web", "--field-selector=spec.nodeName=n3", "-o", "name").strip()
    assert _get_in_time(cluster, running, "http://localhost:8080/") == running.removeprefix("pod/")


def test_nothing_of_it_lies_outside_its_folder_but_under_its_name(cluster: Cluster) -> None:
    assert cluster.control_plane.kubeconfig.exists()
    mounts = Path("/proc/self/mountinfo").read_text()
    folder = str(cluster.control_plane.kubeconfig.parent)
    foreign = [line for line in mounts.splitlines() if "/netns/cni-" in line and folder not in line]
    assert not foreign
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split("\n")
    ours = {line.split()[0] for line in namespaces if line.startswith(Path(folder).name)}
    assert ours == {f"{Path(folder).name}-{part}" for part in ("cp", "n1", "n2", "n3")}
