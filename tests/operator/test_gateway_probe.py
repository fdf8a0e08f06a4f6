"""The chart's liveness probe of the gateway: one that is frozen keeps the jobs from others, so it must be seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from certificates import Authority
from operated import GatewayProcess

CHART = Path(__file__).parents[2] / "helm" / "spillway"


def test_a_frozen_gateway_is_told_from_one_that_lives(helm: Path, tmp_path: Path) -> None:
    rendered = subprocess.check_output([str(helm), "template", "spillway", str(CHART)], text=True, timeout=60)
    (gateway,) = [each for each in yaml.safe_load_all(rendered) if each and each["kind"] == "StatefulSet"]
    probe = gateway["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["exec"]["command"]
    pair = Authority(tmp_path).certify("gateway")
    process = GatewayProcess(tmp_path, "--tls-cert", str(pair.certificate), "--tls-key", str(pair.key))
    here = [word.replace("7400), 10", f"{process.port}), 1") for word in probe]
    assert here != probe

    def status() -> int:
        return subprocess.run([sys.executable, *here[1:]], timeout=60, check=False).returncode

    process.start()
    try:
        assert status() == 0
        process.freeze()
        assert status() != 0
    finally:
        process.stop()
