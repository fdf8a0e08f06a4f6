"""The load benchmark on a small scale: all lines once, every watcher sees the end, memory stays where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "service" / "load.py"
LINES, WATCHERS = 20_000, 100


@pytest.mark.slow
def test_twenty_thousand_lines_and_a_hundred_watchers(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--lines", LINES, "--watchers", WATCHERS, "--report", report, "--directory", tmp_path]
    subprocess.run([sys.executable, BENCHMARK, *map(str, options)], check=True, timeout=240, stdout=subprocess.DEVNULL)
    (figures,) = json.loads(report.read_text())
    assert figures["stream_rows"] == LINES
    assert figures["watch_messages"] >= WATCHERS
    memory = figures["gateway_rss_mib"]
    assert memory["anonymous at the end"] - memory["anonymous at the beginning of the drain"] < 32
