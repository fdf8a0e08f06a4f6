"""What a command need not load, it does not load: a process has started sooner, and is smaller."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PROGRAM = """
import json, sys
from pathlib import Path
heavy = ("torch", "transformers", "triton", "llvmlite", "redis", "grpc", "google", "pydantic", "numpy", "torch._dynamo")
found = {}
def note(step):
    found[step] = [name for name in heavy if name in sys.modules]
from spillway.cli.main import app
note("the command line")
import spillway.cli.jobs
note("jobs")
from spillway.cli.run import run
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.tokenizer import Tokenizer
checkpoint = Checkpoint.open(sys.argv[1])
Tokenizer.load(checkpoint.folder, checkpoint.config)
note("a model")
print(json.dumps(found))
"""


def test_what_each_command_loads(tiny_checkpoint: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_checkpoint("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["the command line"] == []
    assert set(found["jobs"]) <= {"grpc", "google"}
    assert "torch" in found["a model"]
    assert not {"torch._dynamo", "triton", "redis"} & set(found["a model"])
