"""Every kernel that the engine launches compiles for a GPU that is not here, with the engine's own arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_engine.py"
OF_A_STEP = {"_rms_norm_kernel", "_rope_write_kv_kernel", "_flash_prefill_kernel", "_paged_decode_kernel",
             "_merge_spans_kernel", "_silu_mul_kernel", "_move_blocks_kernel", "_sample_kernel"}  # fmt: skip
HEADS_OF_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 1}


@pytest.mark.timeout(900)  # half a minute of compiling, on a machine that may be busy
@pytest.mark.parametrize(
    ("dtype", "family"),
    [
        ("bfloat16", "qwen3"),
        pytest.param("float16", "llama", marks=pytest.mark.slow),
        pytest.param("float32", "qwen2", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_of_a_step_compile_and_fit(tiny_checkpoint: Callable[..., Path], dtype: str, family: str) -> None:
    folder = tiny_checkpoint(family, **HEADS_OF_8B)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(folder), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert {name for name, _ in rows} == OF_A_STEP
    assert [row for row in rows if row[1] != "fits"] == []
    decodes = [name for name, _ in rows if name == "_paged_decode_kernel"]
    assert len(decodes) == 1, "another length of table or number of rows must not mean another kernel"
