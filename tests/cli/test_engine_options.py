"""What a GPU's memory is divided into when the user leaves it to us."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spillway.cli.engine_options import left_for_kv_bytes
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.load import DeviceError
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
