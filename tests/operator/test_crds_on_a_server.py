"""A real API server takes the CRDs and samples, and refuses what each CEL rule is there to refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import ApiError, Kube, ours

ROOT = Path(__file__).parents[2]
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
    ("BatchJob", {**JOB, "input": {}}, "exactly one of input.inline, input.configMap and input.uri"),
    ("BatchJob", {**JOB, "input": {"inline": "{}", "configMap": {"name": "c"}}}, "exactly one of"),
    ("BatchJob", {**JOB, "input": {"uri": "s3://b/i.jsonl", "configMap": {"name": "c"}}}, "exactly one of"),
    ("BatchJob", {**JOB, "input": {"uri": "/srv/i.jsonl"}}, "input.uri"),
    ("KVStore", {}, "give either managed or external"),
    ("KVStore", {"managed": {}, "external": {"urlSecret": {"name": "s"}}}, "give either managed or external"),
    ("KVStore", {"managed": {"storageClassName": "fast"}}, "storageClassName needs storage"),
]
REFUSED_LATER = [
    ("ModelDeployment", MODEL, {"model": "other"}, "model and modelVolume cannot change"),
    ("ModelDeployment", MODEL, {**MODEL, "modelVolume": {"claimName": "c"}}, "model and modelVolume cannot change"),
    ("BatchJob", JOB, {**JOB, "priority": 3}, "only paused can change"),
    ("BatchJob", JOB, {**JOB, "deadline": "2030-01-01T00:00:00Z"}, "only paused can change"),
    ("BatchJob", JOB, {**JOB, "input": {"uri": "s3://b/i.jsonl"}}, "only paused can change"),
    ("KVStore", {"managed": {}}, {"external": {"urlSecret": {"name": "s"}}}, "a managed KVStore stays managed"),
    ("KVStore", {"managed": {"storage": "1Gi"}}, {"managed": {"storage": "2Gi"}}, "storage cannot change"),
    (
        "KVStore",
        {"managed": {"storage": "1Gi"}},
        {"managed": {"storage": "1Gi", "storageClassName": "fast"}},
        "storageClassName cannot change",
    ),
    ("KVStore", {"managed": {}}, {"managed": {"tls": {"secretName": "c"}}}, "tls cannot change"),
]


def apply(kube: Kube, space: str, kind: str, spec: dict[str, Any], **query: str) -> dict[str, Any]:
    return kube.apply(ours(kind, "ruled", **spec), space, **query)


@pytest.mark.parametrize("path", sorted((ROOT / "manifests" / "samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_samples_are_accepted(kube: Kube, path: Path) -> None:
    kube.create(yaml.safe_load(path.read_text()), "default", dryRun="All", fieldValidation="Strict")


@pytest.mark.parametrize(("kind", "spec", "message"), REFUSED_AT_ONCE)
def test_rules_refuse(kube: Kube, kind: str, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        apply(kube, "default", kind, spec, dryRun="All")


@pytest.mark.parametrize("kind", ["ModelDeployment", "KVStore"])
@pytest.mark.parametrize("name", ["qwen2.5", "4bit", "a" * 51])
def test_names_that_cannot_be_host_names_are_refused(kube: Kube, kind: str, name: str) -> None:
    spec = MODEL if kind == "ModelDeployment" else {"managed": {}}
    with pytest.raises(ApiError, match="up to 50 lower-case letters, digits and dashes"):
        kube.create(ours(kind, name, **spec), "default", dryRun="All")


@pytest.mark.parametrize(("kind", "spec", "changed", "message"), REFUSED_LATER)
def test_what_is_fixed_stays(
    kube: Kube, kind: str, spec: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    apply(kube, "default", kind, spec)
    try:
        with pytest.raises(ApiError, match=message):
            apply(kube, "default", kind, changed)
    finally:
        kube.delete(kind, "ruled", "default")


def test_defaults_are_filled_in_and_replicas_scale(kube: Kube, space: str) -> None:
    made = apply(kube, space, "ModelDeployment", MODEL)
    assert (made["spec"]["kv"]["blockTokens"], made["spec"]["resources"]["memory"]) == (16, "4Gi")
    kube.plane.kubectl("scale", "mdep/ruled", "--replicas=3", "-n", space)
    assert kube.get("ModelDeployment", "ruled", space)["spec"]["replicas"] == 3
