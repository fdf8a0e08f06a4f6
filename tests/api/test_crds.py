"""The CRDs are what the models say, and keep to what the API server demands of a structural schema."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spillway.api.resources import BatchJob, KVStore, ModelDeployment, quantity_bytes
from spillway.api.resources.common import ResourceError
from spillway.api.resources.crd import KINDS, crd

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside a schema."""
    if isinstance(node, dict) and "type" in node:
        yield path, node
        for key, each in node.get("properties", {}).items():
            yield from nodes(each, f"{path}.{key}")
        yield from nodes(node.get("items"), f"{path}[]")
        yield from nodes(node.get("additionalProperties"), f"{path}{{}}")


def test_checked_in_crds_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "api" / "generate_crds.py", tmp_path], check=True, timeout=60)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in (ROOT / "manifests" / "crds").iterdir()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_schema_is_structural_and_bounded(kind: type) -> None:
    schema = crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path, node in nodes(schema["properties"]["spec"], "spec"):
        assert not {"$ref", "anyOf", "title", "const"} & node.keys(), path
        assert not ("properties" in node and "additionalProperties" in node), path
        if node["type"] == "string" and path.count("{}") == 0 and node.get("format") != "date-time":
            assert "maxLength" in node or "enum" in node, f"{path} is unbounded, which CEL cannot price"
        if node["type"] == "array":
            assert "maxItems" in node, path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_of_a_spec_is_described(kind: type) -> None:
    spec = crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    bare = [path for path, node in nodes(spec, "spec") if "description" not in node and not path.endswith("{}")]
    assert bare == []


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_are_understood(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    kind = {each.__name__: each for each in KINDS}[manifest["kind"]]
    assert kind.read(manifest).metadata.name == manifest["metadata"]["name"]


def test_defaults_are_the_same_in_python_and_in_the_crd() -> None:
    deployment = ModelDeployment.read({"metadata": {"name": "m"}, "spec": {"model": "m"}})
    spec = crd(ModelDeployment)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert deployment.spec.kv.block_tokens == spec["properties"]["kv"]["properties"]["blockTokens"]["default"]
    assert deployment.spec.replicas == spec["properties"]["replicas"]["default"]
    assert spec["properties"]["kv"]["default"] == {"blockTokens": 16, "dtype": "auto"}


@pytest.mark.parametrize(
    ("kind", "spec", "field"),
    [
        (ModelDeployment, {}, "spec.model"),
        (ModelDeployment, {"model": "m", "replicas": -1}, "spec.replicas"),
        (ModelDeployment, {"model": "m", "kv": {"host": "12 GB"}}, "spec.kv.host"),
        (BatchJob, {"model": "M!", "input": {"inline": "{}"}}, "spec.model"),
        (KVStore, {"managed": {"memory": "0Gi"}}, "spec.managed.memory"),
    ],
)
def test_a_bad_field_is_named(kind: Any, spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ResourceError, match=field.replace(".", r"\.")):
        kind.read({"metadata": {"name": "m"}, "spec": spec})


@given(st.integers(1, 10**6), st.sampled_from([("Ki", 1 << 10), ("Gi", 1 << 30), ("M", 10**6), ("", 1)]))
def test_quantities(number: int, unit: tuple[str, int]) -> None:
    assert quantity_bytes(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize("text", ["", "Gi", "1Qi", "one", "1 Gi"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ResourceError):
        quantity_bytes(text)
