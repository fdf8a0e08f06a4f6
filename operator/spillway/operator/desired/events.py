"""What `kubectl describe` tells below the conditions: when each of them turned, and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spillway.operator.desired.conditions import rfc3339
from spillway.operator.names import FIELD_MANAGER

Manifest = dict[str, Any]
_ON_ITS_WAY = frozenset(
    {"NotReady", "RedisNotReady", "Pending", "Validating", "Running", "Paused", "Finalizing", "Cancelled"}
)
"""Reasons for which a condition does not hold that need nobody's help."""


def news(manifest: Manifest, conditions: Iterable[Manifest], now_s: float) -> list[Manifest]:
    """An event for each condition whose status or reason differs from what `manifest` says.

    What holds from the start is no news, and neither is a message that counts on.
    """
    former = {each["type"]: each for each in manifest.get("status", {}).get("conditions") or ()}
    told = []
    for each in conditions:
        before = former.get(each["type"])
        if before is None and each["status"] == "True":
            continue
        if before is None or (before["status"], before["reason"]) != (each["status"], each["reason"]):
            told.append(_event(manifest, each, now_s))
    return told


def _event(manifest: Manifest, condition: Manifest, now_s: float) -> Manifest:
    metadata, time = manifest["metadata"], rfc3339(now_s).split(".")[0] + "Z"
    is_calm = condition["status"] == "True" or condition["reason"] in _ON_ITS_WAY
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": metadata["namespace"], "generateName": f"{metadata['name'][:200]}."},
        "involvedObject": {
            "apiVersion": manifest["apiVersion"],
            "kind": manifest["kind"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "type": "Normal" if is_calm else "Warning",
        "reason": condition["reason"],
        "message": f"{condition['type']}: {condition['message']}" if condition["message"] else condition["type"],
        "source": {"component": FIELD_MANAGER},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
