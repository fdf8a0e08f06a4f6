"""CRDs from the pydantic models: structural schemas, as the API server wants them."""

from __future__ import annotations

from typing import Any

from spillway.api.resources.batch_job import BatchJob
from spillway.api.resources.common import GROUP, VERSION
from spillway.api.resources.kind import Kind
from spillway.api.resources.kv_store import KVStore
from spillway.api.resources.model_deployment import ModelDeployment

KINDS: tuple[type[Kind], ...] = (ModelDeployment, BatchJob, KVStore)
_DROPPED = ("title", "additionalProperties", "const")


def crd(kind: type[Kind]) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind, ready for YAML."""
    name = kind.__name__
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _schema(kind)},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": each.name, "type": each.type, "jsonPath": each.json_path}
            | ({"priority": each.priority} if each.priority else {})
            for each in kind.columns
        ],
    }
    if kind.scale is not None:
        version["subresources"]["scale"] = {
            "specReplicasPath": kind.scale.spec_replicas,
            "statusReplicasPath": kind.scale.status_replicas,
            "labelSelectorPath": kind.scale.selector,
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": name,
                "listKind": f"{name}List",
                "plural": kind.plural,
                "singular": name.lower(),
                "shortNames": list(kind.short_names),
                "categories": ["spillway"],
            },
            "versions": [version],
        },
    }


def _schema(kind: type[Kind]) -> dict[str, Any]:
    schema = kind.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})
    structural = _structural({key: value for key, value in schema.items() if key != "$defs"}, definitions)
    structural["properties"].pop("metadata")
    structural["properties"] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": structural["properties"]["spec"],
        "status": _without_defaults(structural["properties"]["status"]),
    }
    structural["properties"]["status"].pop("default", None)
    structural["required"] = ["spec"]
    return structural


def _structural(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """One schema with references written out and what structural schemas forbid taken away."""
    node = dict(node)
    if "$ref" in node:
        referred = definitions[node.pop("$ref").rsplit("/", 1)[1]]
        node = {**referred, **node}
    if "anyOf" in node:  # only ever `X | None`: a field that may be left out
        (only,) = (each for each in node.pop("anyOf") if each != {"type": "null"})
        return _structural({**only, **node, "default": None}, definitions)
    if node.get("default", ...) is None:
        del node["default"]
    values = node.get("additionalProperties")
    for key in _DROPPED:
        node.pop(key, None)
    if "properties" in node:
        node["properties"] = {key: _structural(value, definitions) for key, value in node["properties"].items()}
    elif isinstance(values, dict):
        node["additionalProperties"] = _structural(values, definitions)
    if "items" in node:
        node["items"] = _structural(node["items"], definitions)
    if isinstance(node.get("default"), dict) and "properties" in node:
        # Written out: the server holds a default to the rules before it fills in those of its fields.
        node["default"] = {
            key: value["default"] for key, value in node["properties"].items() if value.get("default") is not None
        }
    if isinstance(node.get("default"), tuple):
        node["default"] = list(node["default"])
    if node.get("type") == "integer":
        node.setdefault("format", "int64")
    return node


def _without_defaults(node: dict[str, Any]) -> dict[str, Any]:
    """A status is written by the operator alone: a default would only make up facts."""
    node = {key: value for key, value in node.items() if key != "default"}
    if "properties" in node:
        node["properties"] = {key: _without_defaults(value) for key, value in node["properties"].items()}
    if "items" in node:
        node["items"] = _without_defaults(node["items"])
    return node
