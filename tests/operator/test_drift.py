"""What the server adds is no drift; what somebody changed is."""

from __future__ import annotations

from typing import Any

import pytest

from spillway.operator.desired.drift import holds

DESIRED = {
    "metadata": {"labels": {"a": "b"}},
    "spec": {
        "replicas": 1,
        "hostNetwork": False,
        "volumes": [{"name": "data", "emptyDir": {}}],
        "resources": {"requests": {"memory": "1024Mi", "cpu": "100m"}},
    },
}


def observed(**changed: Any) -> dict[str, Any]:
    spec = {
        "replicas": 1,
        "volumes": [{"name": "data", "emptyDir": {}}],
        "resources": {"requests": {"memory": "1Gi", "cpu": "100m"}},
        "dnsPolicy": "ClusterFirst",
    }
    return {"metadata": {"labels": {"a": "b", "c": "d"}, "uid": "u"}, "spec": spec | changed}


def test_defaults_labels_of_others_and_other_units_are_no_drift() -> None:
    assert holds(observed(), DESIRED)


@pytest.mark.parametrize(
    "changed",
    [
        {"replicas": 0},
        {"hostNetwork": True},
        {"volumes": []},
        {"volumes": [{"name": "data", "emptyDir": {}}, {"name": "more", "emptyDir": {}}]},
        {"volumes": [{"name": "data", "hostPath": {"path": "/"}}]},
        {"resources": {"requests": {"memory": "2Gi", "cpu": "100m"}}},
        {"resources": {"requests": {"memory": "1e9", "cpu": "100m"}}},
        {"resources": {}},
        {"resources": None},
    ],
)
def test_changes_are_drift(changed: dict[str, Any]) -> None:
    assert not holds(observed(**changed), DESIRED)
