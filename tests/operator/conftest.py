"""What the operator's tests share: one control plane with our CRDs and two nodes, and a gateway."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kube import OURS, ApiError, Kube
from operated import GatewayProcess
from testcluster.control_plane import ControlPlane

CRDS = Path(__file__).parents[2] / "manifests" / "crds"
NODES = ("gpu-a", "gpu-b")
OFFERED = {"cpu": "4", "memory": "8Gi", "pods": "80", "nvidia.com/gpu": "1"}
_SPACES = itertools.count()


@pytest.fixture(scope="session")
def kube(control_plane: ControlPlane) -> Iterator[Kube]:
    """The control plane with CRDs, and KUBECONFIG set for operators of this process."""
    kube = Kube(control_plane)
    for path in sorted(CRDS.glob("*.yaml")):
        kube.apply(yaml.safe_load(path.read_text()))
    kube.wait(lambda: all(_serves(kube, kind) for kind in OURS), "our kinds are served")
    kube.plane.restart_controllers()
    former = os.environ.get("KUBECONFIG")
    os.environ["KUBECONFIG"] = str(control_plane.kubeconfig)
    yield kube
    kube.close()
    if former is None:
        del os.environ["KUBECONFIG"]
    else:
        os.environ["KUBECONFIG"] = former


def _serves(kube: Kube, kind: str) -> bool:
    """Established is said before objects can be listed."""
    try:
        kube.list(kind)
    except ApiError:
        return False
    return True


@pytest.fixture(scope="session")
def nodes(kube: Kube) -> Iterator[Kube]:
    """Two nodes with a GPU each, which beat like kubelets: who falls silent loses its pods."""
    for name in NODES:
        kube.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    stopped = threading.Event()
    heart = threading.Thread(target=_beat, args=(kube, stopped))
    heart.start()
    kube.wait(lambda: not any("taints" in kube.get("Node", name)["spec"] for name in NODES), "the nodes are ready")
    yield kube
    stopped.set()
    heart.join()
    for name in NODES:
        kube.delete("Node", name)


def _beat(kube: Kube, stopped: threading.Event) -> None:
    try:
        while True:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": now}
            status = {"capacity": OFFERED, "allocatable": OFFERED, "conditions": [ready]}
            for name in NODES:
                kube.patch("Node", name, "", {"status": status}, "/status")
            if stopped.wait(4.0):
                return
    finally:
        kube.close()


@pytest.fixture
def space(kube: Kube) -> Iterator[str]:
    """A namespace of the test's own."""
    name = f"space-{next(_SPACES)}"
    kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    kube.clean(name)


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway without agents: the test itself works on its lines."""
    process = GatewayProcess(tmp_path_factory.mktemp("gateway"))
    process.start()
    yield process
    process.stop()
