"""Runs the engine on Triton's interpreter, in a process where that is chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "test_engine_on_triton.py"


@pytest.mark.timeout(900)  # some ten seconds of work, on a machine that may be busy
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreted one")
def test_the_engine_runs_on_the_triton_kernels() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SPILLWAY_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", str(FILE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout, "the suite was skipped instead of run"
