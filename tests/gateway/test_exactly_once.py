"""Gateways and workers are killed and started again at random: every line has exactly one result, the right one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from chaos import Plan, check, quiet_run, run

SHORT = [
    Plan(1500, seed=22, gateways=2, calm_after_kills=8),
    Plan(1000, seed=13, tears=True, calm_after_kills=8),
]


def exactly_once(plan: Plan, folder: Path) -> None:
    (folder / "quiet").mkdir()
    quiet = quiet_run(plan, folder / "quiet")
    report = run(plan, folder)
    assert report.gateway_kills
    assert report.worker_kills
    assert report.owners > 1
    check(plan, report, quiet)
    if plan.tears:
        assert report.torn_bytes > 0


@pytest.mark.parametrize("plan", SHORT, ids=["kills among two gateways", "kills and torn logs"])
def test_exactly_one_result_per_line(plan: Plan, tmp_path: Path) -> None:
    exactly_once(plan, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("plan", [Plan(20_000, 0), Plan(20_000, 0, tears=True), Plan(20_000, 0, gateways=3)])
def test_twenty_thousand_lines(seed: int, plan: Plan, tmp_path: Path) -> None:
    exactly_once(dataclasses.replace(plan, seed=seed, most_lines=40), tmp_path)
