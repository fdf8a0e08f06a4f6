"""`spillway run` on a GPU: the lines of the CPU suite, with the CPU's answers where a line is greedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import bodies, mixed_lines, run_batch, write_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # kernels compile on first use
]

BLOCK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
GREEDY = [line["custom_id"] for line in mixed_lines() if line["body"]["temperature"] == 0]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("input") / "in.jsonl", mixed_lines())


@pytest.fixture(scope="module")
def of_the_cpu(model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("cpu") / "out.jsonl"
    run_batch(model, source, output)
    return bodies(output)


def texts(of: dict[str, Any]) -> dict[str, list[str]]:
    """What greedy lines say."""
    choices = {name: of[name]["choices"] for name in GREEDY}
    return {name: [c["text"] if "text" in c else c["message"]["content"] for c in choices[name]] for name in GREEDY}


def test_greedy_lines_say_what_they_say_on_a_cpu(
    model: Path, source: Path, of_the_cpu: dict[str, Any], tmp_path: Path
) -> None:
    _, report = run_batch(model, source, tmp_path / "out.jsonl", device="cuda")
    assert texts(bodies(tmp_path / "out.jsonl")) == texts(of_the_cpu)
    assert report["device"] == "cuda"
    assert report["lines"]["failed"] == 0
    assert report["prefix_hit_share"] > 0.3
    assert report["cuda_graphs"]["failure"] is None
    assert report["cuda_graphs"]["replays"] > 0


def test_a_pool_that_is_too_small_spills_and_changes_nothing(
    model: Path, source: Path, of_the_cpu: dict[str, Any], tmp_path: Path
) -> None:
    tight = {"device_kv_bytes": 20 * BLOCK_BYTES, "host_kv_bytes": 12 * (BLOCK_BYTES + 4096)}
    disk = {"disk_kv_bytes": 32 << 20, "disk_dir": tmp_path / "kv"}
    _, report = run_batch(model, source, tmp_path / "out.jsonl", device="cuda", **tight, **disk)
    assert texts(bodies(tmp_path / "out.jsonl")) == texts(of_the_cpu)
    assert report["scheduler"]["preemptions"] > 0
    assert sum(tier["hits"] for tier in report["store"]["tiers"].values()) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_line_has_an_answer_with_defaults_of_this_machine(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    # Other tests share the GPU: most of what is free must not be most of all there is.
    monkeypatch.setattr("spillway.cli.engine_options._free_cuda_bytes", lambda: 1 << 30)
    left_open = {"device_kv_bytes": None, "host_kv_bytes": None, "max_batch_tokens": None, "dtype": dtype}
    _, report = run_batch(model, source, tmp_path / "out.jsonl", device="auto", **left_open)
    assert len(bodies(tmp_path / "out.jsonl")) == len(mixed_lines())
    assert report["device"] == "cuda"
    assert report["lines"]["failed"] == 0
