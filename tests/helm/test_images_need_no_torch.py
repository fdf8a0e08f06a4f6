"""What the images of gateway and operator run must come up without torch and transformers: they have none."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["spillway.cli.jobs", "spillway.cli.serve", "spillway.operator.process"])
def test_it_is_imported_without_what_only_agents_have(module: str) -> None:
    absent = "('torch', 'transformers', 'tokenizers', 'safetensors', 'triton', 'llvmlite')"
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
