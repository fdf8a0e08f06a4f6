"""`spillway size` prints the arithmetic that people do by hand, and refuses what it does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillway.cli.gpus import MODELS
from spillway.cli.size import UnknownGpuError, find_model, fit, gpu_memory_gib
from spillway.cli.sizes import SizeError, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("2g", 2 * 10**9), ("0", 0), ("64 KiB", 65536), ("7", 7)],
)
def test_sizes_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1GiB", "1e9", "12 parsecs", "1.2.3M", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SizeError, match="not a size"):
        parse_size(text)


@given(size=st.integers(0, 1 << 50))
def test_printed_sizes_are_right_to_three_digits(size: int) -> None:
    printed = parse_size(format_size(size))
    assert abs(printed - size) <= max(0.051 * 2 ** (10 * ((max(size, 1).bit_length() - 1) // 10)), 0.006 * size)


def test_llama_8b_on_an_a10_is_what_the_formula_gives() -> None:
    shape = MODELS["llama-3.1-8b"]
    assert shape.kv_bytes_per_token(16) == 2 * 32 * 8 * 128 * 2 == 131072
    known = fit(shape, "A10", "bfloat16", "bfloat16")
    assert known.tokens == int((22.5 * 2**30 * 0.9 - 8_030_261_248 * 2) / 131072)
    assert fit(shape, "a10", "float32", "float32").tokens == 0, "the weights alone do not fit"
    assert fit(shape, "24GiB", "bfloat16", "fp8").tokens > 2 * known.tokens


def test_a_checkpoint_is_sized_from_its_config(tiny_checkpoint: Callable[..., Path]) -> None:
    shape = find_model(str(tiny_checkpoint("llama")))
    assert shape.kv_bytes_per_token(32) == 2 * 3 * 2 * 16 * 4
    weights = sum(path.stat().st_size for path in tiny_checkpoint("llama").glob("*.safetensors"))
    assert shape.weights * 4 == pytest.approx(weights, rel=0.02)


def test_an_unknown_gpu_gets_a_hint() -> None:
    with pytest.raises(UnknownGpuError, match="H100"):
        gpu_memory_gib("H1000")


def test_the_command_prints_a_table_and_json() -> None:
    command = [sys.executable, "-m", "spillway.cli.main", "size", "llama-3.1-8b", "--gpu", "A10"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "128 KiB" in table
    assert "43,355" in table
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert found["fits"][1]["tokens"] == 43355
