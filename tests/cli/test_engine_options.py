"""What a GPU's memory is divided into when the user leaves it to us."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spillway.cli.engine_options import left_for_kv_bytes
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.load import DeviceError, check_compiler
from spillway.node_agent.models.spec import DecoderSpec

GIB = 1 << 30


@pytest.fixture
def llama_8b(tiny_checkpoint: Callable[..., Path]) -> DecoderSpec:
    sizes = {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128}
    return replace(Checkpoint.open(tiny_checkpoint("llama")).spec, vocab=128_256, tied_embeddings=False, **sizes)


def test_weights_and_a_step_come_before_kv(llama_8b: DecoderSpec) -> None:
    weights = 2 * llama_8b.weight_count()
    assert 14.9 * GIB < weights < 15.1 * GIB
    kv = left_for_kv_bytes(24 * GIB, llama_8b, "bfloat16", 8192, 256)
    assert 4 * GIB < kv < 24 * GIB - weights
    assert left_for_kv_bytes(24 * GIB, llama_8b, "bfloat16", 2048, 256) > kv
    assert left_for_kv_bytes(80 * GIB, llama_8b, "bfloat16", 8192, 256) - kv == pytest.approx(56 * GIB * 0.95, abs=2)


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_loaded(llama_8b: DecoderSpec) -> None:
    with pytest.raises(DeviceError, match=r"weights need 29\.9 GiB"):
        left_for_kv_bytes(24 * GIB, llama_8b, "float32", 8192, 256)


def test_a_machine_that_cannot_build_kernels_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("sysconfig.get_config_var", lambda _name: str(tmp_path))
    with pytest.raises(DeviceError, match=r"built with Python's headers \(.*Python\.h\), which") as told:
        check_compiler()
    assert "apt-get install" in str(told.value.hint)
    (tmp_path / "Python.h").touch()
    check_compiler()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="a C compiler"):
        check_compiler()


def test_many_rows_at_once_take_memory_from_kv(llama_8b: DecoderSpec) -> None:
    few, many = (left_for_kv_bytes(24 * GIB, llama_8b, "bfloat16", 8192, rows) for rows in (8, 256))
    logits = 248 * llama_8b.vocab * 6
    partial_results = 248 * 32 * 32 * 129 * 4
    assert few - many > 2 * (logits + partial_results), "of steps without graphs, and of graphs"
