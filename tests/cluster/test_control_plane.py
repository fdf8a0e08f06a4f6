"""The control plane alone is real: it schedules, refuses, and keeps what it was given over a restart."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from testcluster.control_plane import ControlPlane
from testcluster.programs import KUBERNETES_VERSION

_GATED_POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "gated"},
    "spec": {"schedulingGates": [{"name": "spillway.dev/placement"}], "containers": [{"name": "c", "image": "none"}]},
}


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    control_plane.kubectl("create", "namespace", "ground")
    yield "ground"
    control_plane.kubectl("delete", "namespace", "ground")  # returns when its content is gone


def _scheduled_reason(control_plane: ControlPlane, namespace: str, other_than: str | None) -> str:
    """The reason of the pod's condition PodScheduled, once it is there and not `other_than`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pod = json.loads(control_plane.kubectl("-n", namespace, "get", "pod", "gated", "-o", "json"))
        for condition in pod["status"].get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["reason"] != other_than:
                return str(condition["reason"])
        time.sleep(0.1)
    raise AssertionError("the scheduler said nothing new")


def test_it_is_the_pinned_version(control_plane: ControlPlane) -> None:
    version = json.loads(control_plane.kubectl("version", "-o", "json"))
    assert version["serverVersion"]["gitVersion"] == KUBERNETES_VERSION


def test_a_gated_pod_waits_until_its_gate_is_lifted(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl("-n", namespace, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
    control_plane.kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(_GATED_POD))
    assert _scheduled_reason(control_plane, namespace, None) == "SchedulingGated"
    lift = '[{"op": "remove", "path": "/spec/schedulingGates"}]'
    control_plane.kubectl("-n", namespace, "patch", "pod", "gated", "--type=json", "-p", lift)
    assert _scheduled_reason(control_plane, namespace, "SchedulingGated") == "Unschedulable"  # there are no nodes


def test_a_killed_api_server_comes_back_with_its_data(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl("-n", namespace, "create", "configmap", "kept", "--from-literal=a=b")
    control_plane.restart_api_server()
    assert control_plane.kubectl("-n", namespace, "get", "configmap", "kept", "-o", "jsonpath={.data.a}") == "b"
