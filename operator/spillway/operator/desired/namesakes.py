"""Whose a name is. Jobs go by the deployment's name alone, so no two of one name may serve different models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Manifest = dict[str, Any]


def name_taken(deployment: Manifest, namesakes: Sequence[Manifest]) -> str | None:
    """One sentence where an older ModelDeployment of this name, in another namespace, serves another model.

    `namesakes`: all of this name in the cluster. The oldest has the name; of one second, the one whose UID is less.
    """
    for other in sorted(namesakes, key=_age):
        if other["metadata"]["uid"] == deployment["metadata"]["uid"]:
            return None
        if _model(other) != _model(deployment):
            where = f"{other['metadata']['namespace']}/{other['metadata']['name']}"
            return f"jobs for this name go to ModelDeployment {where}, which has another model; take another name"
    return None


def _age(deployment: Manifest) -> tuple[str, str]:
    return deployment["metadata"]["creationTimestamp"], deployment["metadata"]["uid"]


def _model(deployment: Manifest) -> tuple[Any, Any]:
    """A volume is one of its namespace: the same name elsewhere says nothing of what is in it."""
    spec = deployment["spec"]
    volume = spec.get("modelVolume")
    return spec["model"], None if volume is None else (deployment["metadata"]["namespace"], volume["claimName"])
