"""The door: which implementation runs, and what a caller who errs is told."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from spillway import kernels
from spillway.kernels import AttentionParams, KernelDtypeError, KernelShapeError, KernelValueError, QuantFormat


def call(**changes: Any) -> torch.Tensor:
    """A paged_decode that is right but for the changes."""
    arguments = {
        "q": torch.zeros(2, 4, 64),
        "pool": torch.zeros(3, 2, 2, 2, 16, 64),
        "layer": 1,
        "block_tables": torch.zeros(2, 1, dtype=torch.int32),
        "context_lens": torch.ones(2, dtype=torch.int32),
        "params": AttentionParams(0.125),
    } | changes
    return kernels.paged_decode(**arguments)


def test_a_right_call_is_taken() -> None:
    assert call().shape == (2, 4, 64)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"q": torch.zeros(2, 64)}, KernelShapeError),
        ({"q": torch.zeros(2, 5, 64)}, KernelShapeError),
        ({"q": torch.zeros(2, 4, 32)}, KernelShapeError),
        ({"q": torch.zeros(3, 4, 64)}, KernelShapeError),
        ({"q": torch.zeros(2, 4, 128)[:, :, ::2]}, KernelShapeError),
        ({"q": torch.zeros(2, 4, 64, dtype=torch.float64)}, KernelDtypeError),
        ({"pool": torch.zeros(3, 2, 2, 16, 64)}, KernelShapeError),
        ({"pool": torch.zeros(3, 2, 2, 2, 12, 64)}, KernelShapeError),
        ({"pool": torch.zeros(3, 2, 2, 2, 256, 64)}, KernelShapeError),
        ({"pool": torch.zeros(3, 2, 2, 2, 16, 128)[..., ::2]}, KernelShapeError),
        ({"pool": torch.zeros(3, 2, 2, 2, 16, 64, dtype=torch.int32)}, KernelDtypeError),
        ({"layer": 2}, KernelShapeError),
        ({"layer": -1}, KernelShapeError),
        ({"block_tables": torch.zeros(2, 1, dtype=torch.int64)}, KernelDtypeError),
        ({"block_tables": torch.zeros(3, 1, dtype=torch.int32)}, KernelShapeError),
        ({"block_tables": torch.zeros(1, 2, dtype=torch.int32).T[:, :0].expand(2, 0)}, None),
        ({"context_lens": torch.ones(2, dtype=torch.int64)}, KernelDtypeError),
        ({"context_lens": torch.ones(3, dtype=torch.int32)}, KernelShapeError),
        ({"out": torch.zeros(2, 4, 32)}, KernelShapeError),
        ({"out": torch.zeros(2, 4, 64, dtype=torch.bfloat16)}, KernelShapeError),
        ({"lse": torch.zeros(2, 4, dtype=torch.float64)}, KernelShapeError),
        ({"params": AttentionParams(0.1, alibi_slopes=torch.zeros(3))}, KernelShapeError),
        ({"params": AttentionParams(0.1, kv_scales=torch.zeros(2, 4))}, KernelShapeError),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception] | None) -> None:
    if error is None:
        call(**changes, context_lens=torch.zeros(2, dtype=torch.int32))
        return
    with pytest.raises(error):
        call(**changes)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0.0},
        {"scale": float("nan")},
        {"scale": 1.0, "window": 0},
        {"scale": 1.0, "sinks": -1},
        {"scale": 1.0, "soft_cap": 0.0},
        {"scale": 1.0, "alibi_slopes": torch.zeros(2, 2)},
        {"scale": 1.0, "alibi_slopes": torch.zeros(2, dtype=torch.float64)},
        {"scale": 1.0, "kv_scales": torch.zeros(3)},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(KernelValueError):
        AttentionParams(**settings)


def test_the_other_ops_refuse_what_does_not_fit() -> None:
    pool, k = torch.zeros(3, 2, 2, 2, 16, 64), torch.zeros(5, 2, 64)
    slots = torch.zeros(5, dtype=torch.int64)
    x, weight = torch.zeros(3, 8), torch.ones(8)
    table = torch.zeros(9, 64)
    params, ids = AttentionParams(0.125), torch.zeros(1, dtype=torch.int32)
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    q = torch.zeros(1, 4, 64)
    for error, refused in [
        (KernelShapeError, lambda: kernels.write_kv(k[:, :1], k[:, :1], pool, 0, slots)),
        (KernelShapeError, lambda: kernels.write_kv(k, k[:4], pool, 0, slots)),
        (KernelShapeError, lambda: kernels.write_kv(k, k, pool, 0, slots[:4])),
        (KernelDtypeError, lambda: kernels.write_kv(k, k, pool, 0, slots.int())),
        (KernelShapeError, lambda: kernels.write_kv(k, k, pool, 5, slots)),
        (KernelShapeError, lambda: kernels.rope_write_kv(torch.zeros(5, 100), table, slots, pool, 0, slots)),
        (KernelShapeError, lambda: kernels.rope_write_kv(torch.zeros(5, 512), table[:, :63], slots, pool, 0, slots)),
        (KernelDtypeError, lambda: kernels.rope_write_kv(torch.zeros(5, 512), table, slots.int(), pool, 0, slots)),
        (
            KernelShapeError,
            lambda: kernels.rope_write_kv(torch.zeros(5, 512), table, slots, pool, 0, slots, q_norm=torch.zeros(63)),
        ),
        (KernelShapeError, lambda: kernels.rms_norm(x, weight[:4], 1e-6)),
        (KernelShapeError, lambda: kernels.rms_norm(x, weight, 1e-6, residual=x[:2])),
        (KernelDtypeError, lambda: kernels.rms_norm(x.double(), weight.double(), 1e-6)),
        (KernelShapeError, lambda: kernels.silu_mul(torch.zeros(3, 7))),
        (KernelShapeError, lambda: kernels.gather_blocks(pool, slots[:2], torch.zeros(3, *pool.shape[1:]))),
        (KernelDtypeError, lambda: kernels.scatter_blocks(pool, slots[:1], torch.zeros(1, *pool.shape[1:]).bfloat16())),
        (KernelDtypeError, lambda: kernels.copy_blocks(pool, slots[:1].int(), slots[:1])),
        (KernelShapeError, lambda: kernels.quantize(torch.zeros(1, 1, 2, 1, 16, 63), QuantFormat.INT4)),
        (
            KernelShapeError,
            lambda: kernels.dequantize(torch.zeros(1, 9, dtype=torch.uint8), QuantFormat.INT8, pool[:1]),
        ),
        (KernelDtypeError, lambda: kernels.quantize(pool.double(), QuantFormat.INT8)),
        (KernelShapeError, lambda: kernels.merge_states(q, torch.zeros(1, 4), q, torch.zeros(1, 3))),
        (KernelShapeError, lambda: kernels.flash_prefill(q, pool, 0, ids[None], starts[:1], lens, params)),
        (KernelValueError, lambda: kernels.cascade_decode(q, pool, 0, ids[None], lens, 16, params)),
        (
            KernelShapeError,
            lambda: kernels.score_sums(
                q, pool, 0, ids[None], starts, lens, torch.zeros(1, 4), params, torch.zeros(1, 2, 0)
            ),
        ),
    ]:
        with pytest.raises(error):
            refused()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("SPILLWAY_KERNELS", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, timeout=120, check=False
    )


CALL = "import torch; from spillway import kernels; print(float(kernels.silu_mul(torch.ones(1, 32)).sum()))"


def test_the_environment_forces_an_implementation() -> None:
    assert run(CALL, SPILLWAY_KERNELS="twin").stdout.startswith("11.69")
    refused = run(CALL, SPILLWAY_KERNELS="fastest")
    assert "BackendError: SPILLWAY_KERNELS must be 'twin' or 'triton', got 'fastest'" in refused.stderr
    late = run(f"import triton; {CALL}", SPILLWAY_KERNELS="triton")
    assert "BackendError" in late.stderr
    assert "TRITON_INTERPRET" in late.stderr


def test_importing_the_kernels_loads_neither_triton_nor_llvm() -> None:
    code = "import sys, spillway.kernels; print([m for m in ('triton', 'llvmlite', 'numba') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"
