"""Starts runs, from outside their walls."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .driver import Plan, Report
from .ground import python, scratch, walls

_HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Length:
    """How long a run is. ``most_s``: when it is enough, whatever the operations; ``limit_s``: when it is broken off."""

    operations: int
    workers: int
    round_s: float
    most_s: float
    limit_s: float


def chaos(seed: int, length: Length, logs: Path | None = None) -> Report:
    """One run. ``logs``: where what its processes wrote is kept. Raises RuntimeError if it gave no report."""
    with scratch() as directory:
        plan = Plan(seed, length.operations, length.workers, length.round_s, length.most_s, str(directory))
        (directory / "plan.json").write_bytes(msgspec.json.encode(plan))
        paths = [str(directory / "plan.json"), str(directory / "report.json")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_HERE), os.environ.get("PYTHONPATH", "")])}
        try:
            done = subprocess.run(
                [*walls(), *python("driver", *paths)],
                env=environment,
                timeout=length.limit_s,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                for log in directory.glob("*.log"):
                    (logs / log.name).write_bytes(log.read_bytes())
        report = directory / "report.json"
        if not report.exists():
            raise RuntimeError(f"the run ended with {done.returncode} and no report: {done.stderr[-4000:]}")
        return msgspec.json.decode(report.read_bytes(), type=Report)
