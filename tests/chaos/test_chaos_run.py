"""Stores of several processes under load, and faults: no wrong byte, no leak, no fault that no metric shows."""

from __future__ import annotations

import pytest
from storechaos.chaos import Length, chaos
from storechaos.ground import missing

SHORT = Length(operations=3000, workers=3, round_s=1.2, most_s=120, limit_s=240)


def test_whatever_strikes_the_store_keeps_its_word() -> None:
    if lacks := missing():
        pytest.skip(lacks)
    report = chaos(20, SHORT)
    assert report.violations == []
    assert report.counts.operations >= SHORT.operations
    assert report.counts.hits > 0
    assert report.survivors > 0
    for fault in report.faults:
        assert fault.strikes or fault.left_out, f"{fault.kind} did not strike"
