"""helm itself against a real API server without nodes: what upgrades keep and change, what uninstalling leaves."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testcluster.control_plane import ControlPlane

CHART = Path(__file__).parents[2] / "helm" / "spillway"
SPACE = "released"
Helm = Callable[..., str]


@pytest.fixture(scope="module")
def released(control_plane: ControlPlane, helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Helm]:
    """helm in a namespace of its own, with one release in it."""
    home = tmp_path_factory.mktemp("helm")
    environment = os.environ | {"KUBECONFIG": str(control_plane.kubeconfig), "HOME": str(home)}

    def run(verb: str, *words: str, values: dict[str, Any] | None = None) -> str:
        target = [] if verb == "uninstall" else [str(CHART), "--values=-"]
        command = [str(helm), verb, "spillway", *target, f"--namespace={SPACE}", *words]
        done = subprocess.run(
            command, env=environment, input=json.dumps(values or {}), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    control_plane.kubectl("create", "namespace", SPACE)
    run("install")
    yield run
    control_plane.kubectl("delete", "namespace", SPACE, "--wait=false")


@pytest.fixture
def get(control_plane: ControlPlane) -> Callable[..., Any]:
    def found(*what: str) -> Any:
        return json.loads(control_plane.kubectl("get", f"--namespace={SPACE}", *what, "--output=json"))

    return found


def secrets(get: Callable[..., Any]) -> dict[str, Any]:
    """Of the chart, by name; helm keeps its own beside them."""
    found = {each["metadata"]["name"]: each["data"] for each in get("secrets")["items"]}
    return {name: data for name, data in found.items() if name.startswith("spillway-")}


def test_an_upgrade_keeps_tokens_and_certificate_and_restarts_what_changed(
    released: Helm, get: Callable[..., Any]
) -> None:
    before, gateway, operator = secrets(get), get("statefulset/spillway-gateway"), get("deployment/spillway-operator")
    assert set(before) == {f"spillway-{each}" for each in ("agent", "client", "monitor", "gateway", "gateway-tls")}
    released("upgrade", values={"agents": {"device": "cpu"}, "gateway": {"tokens": ["0" * 64 + " team client"]}})
    after = secrets(get)
    assert after.pop("spillway-gateway") != before.pop("spillway-gateway"), "a further caller"
    assert after == before
    changed = get("deployment/spillway-operator")
    assert changed["metadata"]["uid"] == operator["metadata"]["uid"]
    assert changed["spec"]["template"] != operator["spec"]["template"]
    assert get("statefulset/spillway-gateway")["spec"] == gateway["spec"], "it reads tokens anew by itself"


def test_uninstalled_and_installed_again_the_jobs_are_those_of_before(released: Helm, get: Callable[..., Any]) -> None:
    (claim,) = get("persistentvolumeclaims")["items"]
    released("uninstall")
    (kept,) = get("persistentvolumeclaims")["items"]
    assert kept["metadata"]["uid"] == claim["metadata"]["uid"]
    assert "deletionTimestamp" not in kept["metadata"]
    released("install")
    (found,) = get("persistentvolumeclaims")["items"]
    assert found["metadata"]["uid"] == claim["metadata"]["uid"]
