"""Runs the Triton suite under Triton's interpreter, in a process where the interpreter is chosen before the import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton_ground import INTERPRETED

HERE = Path(__file__).parent
SUITE = ["test_triton_attention.py", "test_triton_rows.py"]


@pytest.mark.timeout(900)  # half a minute of work, on a machine that may be busy
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreted one")
@pytest.mark.parametrize("file", SUITE)
def test_the_suite_holds_under_the_interpreter(file: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 10, "the suite was skipped instead of run"
