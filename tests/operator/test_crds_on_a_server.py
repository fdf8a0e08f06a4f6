"""A real API server takes the CRDs and samples, and refuses what each CEL rule is there to refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from testcluster.control_plane import ControlPlane
from testcluster.errors import ClusterError

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "manifests" / "crds"
MODEL = {"model": "m"}
JOB = {"model": "m", "input": {"inline": "{}"}}

REFUSED_AT_ONCE = [
    (
        "ModelDeployment",
        {**MODEL, "resources": {"gpus": 2}, "parallelism": {"tensor": 3}},
        "multiple of resources.gpus",
    ),
    ("ModelDeployment", {**MODEL, "kv": {"host": "4Gi"}}, "kv.host must be less than resources.memory"),
    ("ModelDeployment", {**MODEL, "kvStore": {"name": "s"}}, "kvStore needs kv.host"),
    ("ModelDeployment", {**MODEL, "kv": {"dtype": "float32", "blockTokens": 256}}, "at most 128 tokens"),
    (
        "ModelDeployment",
        {**MODEL, "placement": {"tolerations": [{"key": "k", "value": "v"}]}},
        "operator Exists has no value",
    ),
    ("BatchJob", {**JOB, "input": {}}, "either input.inline or input.configMap"),
    ("BatchJob", {**JOB, "input": {"inline": "{}", "configMap": {"name": "c"}}}, "either input.inline"),
    ("KVStore", {}, "give either managed or external"),
    ("KVStore", {"managed": {}, "external": {"urlSecret": {"name": "s"}}}, "give either managed or external"),
    ("KVStore", {"managed": {"storageClassName": "fast"}}, "storageClassName needs storage"),
]
REFUSED_LATER = [
    ("ModelDeployment", MODEL, {"model": "other"}, "model cannot change"),
    ("BatchJob", JOB, {**JOB, "priority": 3}, "only paused can change"),
    ("BatchJob", JOB, {**JOB, "deadline": "2030-01-01T00:00:00Z"}, "only paused can change"),
    ("KVStore", {"managed": {}}, {"external": {"urlSecret": {"name": "s"}}}, "a managed KVStore stays managed"),
    ("KVStore", {"managed": {"storage": "1Gi"}}, {"managed": {"storage": "2Gi"}}, "storage cannot change"),
    (
        "KVStore",
        {"managed": {"storage": "1Gi"}},
        {"managed": {"storage": "1Gi", "storageClassName": "fast"}},
        "storageClassName cannot change",
    ),
]


@pytest.fixture(scope="module")
def server(control_plane: ControlPlane) -> ControlPlane:
    control_plane.kubectl("apply", "--server-side", "-f", str(CRDS))
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(CRDS))
    return control_plane


def apply(server: ControlPlane, kind: str, spec: dict[str, Any], *options: str) -> dict[str, Any]:
    manifest = {"apiVersion": "spillway.dev/v1alpha1", "kind": kind, "metadata": {"name": "ruled"}, "spec": spec}
    words = ("replace", "--force") if "--force" in options else ("apply", "--server-side", "--force-conflicts")
    more = [each for each in options if each != "--force"]
    answer: dict[str, Any] = json.loads(
        server.kubectl(*words, *more, "-o", "json", "-f", "-", stdin=json.dumps(manifest))
    )
    return answer


@pytest.mark.parametrize("path", sorted((ROOT / "manifests" / "samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_samples_are_accepted(server: ControlPlane, path: Path) -> None:
    server.kubectl("create", "--validate=strict", "--dry-run=server", "-f", str(path))


@pytest.mark.parametrize(("kind", "spec", "message"), REFUSED_AT_ONCE)
def test_rules_refuse(server: ControlPlane, kind: str, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        apply(server, kind, spec, "--dry-run=server")


@pytest.mark.parametrize(("kind", "spec", "changed", "message"), REFUSED_LATER)
def test_what_is_fixed_stays(
    server: ControlPlane, kind: str, spec: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    apply(server, kind, spec)
    try:
        with pytest.raises(ClusterError, match=message):
            apply(server, kind, changed)
    finally:
        server.kubectl("delete", kind.lower(), "ruled")


def test_defaults_are_filled_in_and_replicas_scale(server: ControlPlane) -> None:
    made = apply(server, "ModelDeployment", MODEL)
    try:
        assert (made["spec"]["kv"]["blockTokens"], made["spec"]["resources"]["memory"]) == (16, "4Gi")
        server.kubectl("scale", "mdep/ruled", "--replicas=3")
        assert server.kubectl("get", "mdep", "ruled", "-o", "jsonpath={.spec.replicas}") == "3"
    finally:
        server.kubectl("delete", "mdep", "ruled")
