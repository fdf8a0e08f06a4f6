"""The operator's file: what is wrong in it is said with its place, and nothing in it is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spillway.operator.config import OperatorConfig
from spillway.operator.errors import ConfigError

GOOD: dict[str, Any] = {
    "gateway": {"address": "spillway-gateway.spillway.svc:7400", "caFile": "/etc/ca.crt", "tokenFile": "/etc/token"},
    "agents": {"image": "agent:1", "volumes": [{"name": "torch", "hostPath": {"path": "/opt/torch"}}]},
    "redis": {"image": "redis:8"},
}


def load(folder: Path, content: Any) -> OperatorConfig:
    (folder / "operator.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return OperatorConfig.load(folder / "operator.json")


def test_a_file_as_the_chart_writes_it(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    assert found.agents.image_pull_policy == "IfNotPresent"
    target = found.gateway.target()
    assert (target.address, target.token_file) == ("spillway-gateway.spillway.svc:7400", Path("/etc/token"))
    assert target.tls is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Invalid JSON"),
        ({"gateway": GOOD["gateway"], "redis": GOOD["redis"]}, "agents: Field required"),
        ({**GOOD, "gateway": {"address": "gateway"}}, "gateway.address: String should match"),
        ({**GOOD, "agents": {"image": "a", "replicas": 3}}, "agents.replicas: Extra inputs"),
        ({**GOOD, "agents": {"image": "a", "volumes": [{"name": "kv"}]}}, "the name 'kv' is the operator's own"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, content)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        OperatorConfig.load(tmp_path / "none.json")
