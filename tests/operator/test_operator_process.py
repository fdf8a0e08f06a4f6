"""The operator's process on a real API server: killed and started again it goes on, and doubles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testcluster.control_plane import ControlPlane

CRDS = Path(__file__).parents[2] / "manifests" / "crds"
SPACE = "operated"
CODE = """
import asyncio, logging
from spillway.operator.desired.agents import AgentSettings
from spillway.operator.process import run
logging.basicConfig(level=logging.INFO)
asyncio.run(run(AgentSettings("spillway-agent:test", "gateway:7400"), "operated"))
"""


@pytest.fixture
def server(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    control_plane.kubectl("apply", "--server-side", "-f", str(CRDS))
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(CRDS))
    control_plane.kubectl("create", "namespace", SPACE)
    yield control_plane
    control_plane.kubectl("delete", "pods", "--all", "-n", SPACE, "--grace-period=0", "--force")
    control_plane.kubectl("delete", "namespace", SPACE, "--timeout=100s")


def start(server: ControlPlane) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CODE], env={**os.environ, "KUBECONFIG": str(server.kubeconfig)})


def pods(server: ControlPlane) -> list[str]:
    return sorted(server.kubectl("get", "pods", "-n", SPACE, "-o", "name").split())


def test_killed_and_started_again_it_goes_on_and_doubles_nothing(server: ControlPlane) -> None:
    spec = {"model": "/models/m", "replicas": 2, "resources": {"memory": "1Gi"}}
    manifest = {"apiVersion": "spillway.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "m"}}
    server.kubectl("apply", "-n", SPACE, "-f", "-", stdin=json.dumps(manifest | {"spec": spec}))
    first = start(server)
    try:
        server.wait(lambda: len(pods(server)) == 2, "both agents are made")
    finally:
        first.kill()
        first.wait()
    made = pods(server)
    server.kubectl("scale", "mdep/m", "-n", SPACE, "--replicas=3")
    second = start(server)
    try:
        server.wait(lambda: len(pods(server)) == 3, "the next operator makes the third")
        assert set(made) < set(pods(server))
        second.terminate()
        assert second.wait(60) == 0
    finally:
        second.kill()
        second.wait()
    holder = ("get", "lease", "spillway-operator", "-n", SPACE, "-o", "jsonpath={.spec.holderIdentity}")
    assert server.kubectl(*holder) == "", "released for the next"
