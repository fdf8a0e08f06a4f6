"""Objects that belong to a resource, so that the cluster itself cleans up, with or without an operator."""

from __future__ import annotations

from typing import Any

from spillway.api.resources.common import API_VERSION
from spillway.api.resources.kind import Kind

Manifest = dict[str, Any]


def metadata(owner: Kind, name: str, labels: dict[str, str]) -> Manifest:
    """Of an object in its owner's namespace."""
    return {
        "name": name,
        "namespace": owner.metadata.namespace,
        "labels": labels,
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": type(owner).__name__,
                "name": owner.metadata.name,
                "uid": owner.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
