"""The operator under the chart's own account: what it may do is what it does, no less and no more."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import Kube, ours, said
from operated import GatewayProcess, OperatorProcess, lines

CHART = Path(__file__).parents[2] / "helm" / "spillway"
HOME = "spillway"
"""The release's namespace, whose accounts' reads are in the audit, too."""
ACCOUNT = f"system:serviceaccount:{HOME}:spillway-operator"
RIGHTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
SMALL = {"cpu": "1m", "memory": "16Mi"}
Right = tuple[str, str, str]
ASKED_BESIDE = {
    # A patch that applies what does not exist yet.
    ("", "services", "create"),
    ("apps", "statefulsets", "create"),
    # To own what blocks the deletion of its owner: the API server has that plugin here.
    ("spillway.dev", "modeldeployments/finalizers", "update"),
    ("spillway.dev", "kvstores/finalizers", "update"),
}
"""What the API server asks for beside a call, so that no call of that name is in its audit."""


@pytest.fixture
def rights(kube: Kube, helm: Path) -> list[dict[str, Any]]:
    """The chart's account with its roles, installed."""
    kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HOME}})
    command = [str(helm), "template", "spillway", str(CHART), f"--namespace={HOME}"]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = [each for each in yaml.safe_load_all(rendered) if each and each["kind"] in RIGHTS]
    kube.plane.kubectl("apply", f"--namespace={HOME}", "-f", "-", stdin=yaml.safe_dump_all(found))
    return found


@pytest.fixture
def operator(
    rights: list[dict[str, Any]],
    nodes: Kube,
    gateway: GatewayProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[OperatorProcess]:
    """One that leads, logged in by a token of that account."""
    assert rights
    login = json.loads(nodes.plane.kubeconfig.read_text())
    token = nodes.plane.kubectl("create", "token", "spillway-operator", f"--namespace={HOME}").strip()
    login["users"][0]["user"] = {"token": token}
    (tmp_path / "kubeconfig").write_text(json.dumps(login))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    process = OperatorProcess(tmp_path, gateway.address, "operator")
    process.start(HOME)
    nodes.wait(process.leads, "it leads")
    yield process
    process.kill()


def test_it_may_do_what_it_does_and_nothing_else(
    operator: OperatorProcess, rights: list[dict[str, Any]], nodes: Kube, gateway: GatewayProcess, space: str
) -> None:
    kv_stores(nodes, space)
    deployments(nodes, space)
    batch_jobs(nodes, space, gateway)
    calls = audited(nodes)
    refused = [row["requestURI"] for row in calls if row["annotations"]["authorization.k8s.io/decision"] != "allow"]
    assert not refused
    assert {right(row) for row in calls} == granted(rights) - ASKED_BESIDE
    assert granted(rights) >= ASKED_BESIDE


def kv_stores(kube: Kube, space: str) -> None:
    kube.apply(ours("KVStore", "blocks", managed={}), space)
    kube.wait(lambda: said(kube.get("KVStore", "blocks", space), "Ready"), "the store is told of")


def deployments(kube: Kube, space: str) -> None:
    """Made, placed, refused by a quota, and shrunk."""
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "pods"}, "spec": {"hard": {"pods": "3"}}}
    kube.plane.kubectl("apply", f"--namespace={space}", "-f", "-", stdin=json.dumps(quota))
    deploy = {"model": "/models/m", "resources": SMALL, "kv": {"host": "8Mi"}, "kvStore": {"name": "blocks"}}
    kube.apply(ours("ModelDeployment", "m", replicas=4, **deploy), space)
    kube.wait(
        lambda: "exceeded quota" in said(kube.get("ModelDeployment", "m", space), "Ready").get("message", ""),
        "what the quota leaves out is told",
    )
    kube.apply(ours("ModelDeployment", "m", replicas=1, **deploy), space)
    kube.wait(lambda: agents(kube, space) == ["0"], "it has shrunk, and its agent has a node")


def agents(kube: Kube, space: str) -> list[str]:
    """Groups whose agents are here to stay and have a node."""
    pods = [pod for pod in kube.list("Pod", space).values() if "deletionTimestamp" not in pod["metadata"]]
    groups = [
        pod["metadata"]["labels"].get("spillway.dev/group") for pod in pods if not pod["spec"].get("schedulingGates")
    ]
    return sorted(group for group in groups if group is not None)


def batch_jobs(kube: Kube, space: str, gateway: GatewayProcess) -> None:
    """One that runs to its end from a ConfigMap, and one that is deleted on the way."""
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "input"}, "data": {"lines": lines(1)}}
    kube.create(manifest, space)
    source = {"configMap": {"name": "input", "key": "lines"}}
    for name in ("done", "deleted"):
        kube.create(ours("BatchJob", name, model=f"{name}-{space}", input=source), space)
    kube.wait(lambda: gateway.answer(f"done-{space}", 1), "its line is answered")
    for name, state in (("done", "Completed"), ("deleted", "Running")):
        kube.wait(lambda: kube.get("BatchJob", name, space).get("status", {}).get("state") == state, state)  # noqa: B023 - called at once
    kube.delete("BatchJob", "deleted", space)
    kube.wait(lambda: kube.find("BatchJob", "deleted", space) is None, "it is let go")


def audited(kube: Kube) -> list[Any]:
    """All calls of the account that are about objects."""
    return [row for row in kube.plane.audited(ACCOUNT) if "objectRef" in row]


def right(row: Any) -> Right:
    """What a call needs."""
    of = row["objectRef"]
    name = of["resource"] + (f"/{of['subresource']}" if "subresource" in of else "")
    return of.get("apiGroup", ""), name, row["verb"]


def granted(rights: list[dict[str, Any]]) -> set[Right]:
    """What the roles allow."""
    rules = [rule for each in rights if each["kind"] in ("ClusterRole", "Role") for rule in each["rules"]]
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
