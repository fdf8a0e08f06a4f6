"""Norms, activation and rotary on the CPU: near the float64 definition, and the same bits whatever rows are around."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spillway.kernels import rms_norm, rope_write_kv, silu_mul
from spillway.kernels.reference import fused

ROWS = [1, 2, 7, 33, 300]


def close(out: Tensor, expected: Tensor, bound: float = 3e-7) -> None:
    assert torch.isfinite(out).all(), "an element was not written"
    assert float((out.double() - expected).norm() / expected.norm()) < bound


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [16, 48, 576, 100])
def test_rms_norm(rows: int, width: int) -> None:
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    close(rms_norm(x, weight, 1e-5, out=poisoned(rows, width)), fused.rms_norm(x, weight, 1e-5)[0])
    expected, added = fused.rms_norm(x, weight, 1e-5, residual)
    assert added is not None
    own, left = x.clone(), residual.clone()
    close(rms_norm(own, weight, 1e-5, residual=left, out=own), expected)
    assert torch.equal(left, added)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [16, 80, 1536, 30])
def test_silu_mul(rows: int, width: int) -> None:
    gate_up = torch.randn(rows, 2 * width) * 4
    close(silu_mul(gate_up, out=poisoned(rows, width)), fused.silu_mul(gate_up), 6e-7)


def test_silu_of_large_numbers_does_not_overflow() -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 1e4, 0.0, -0.0] * 2])
    out = silu_mul(torch.cat([gate, torch.ones_like(gate)], 1))
    assert torch.isfinite(out).all()
    assert torch.allclose(out, torch.nn.functional.silu(gate), atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "rotated"), [(16, 16), (64, 64), (80, 80), (128, 64), (24, 24), (20, 20)])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_and_the_kv_write(dtype: torch.dtype, head_dim: int, rotated: int, norms: bool) -> None:
    tokens, q_heads, kv_heads, layer = 37, 6, 2, 1
    pool = torch.randn(5, 3, 2, kv_heads, 16, head_dim).to(dtype)
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim)
    cos_sin, positions = torch.randn(90, rotated), torch.randint(0, 90, (tokens,))
    slots = torch.randperm(80)[:tokens]
    slots[5] = -1
    q_norm, k_norm = (torch.randn(head_dim), torch.randn(head_dim)) if norms else (None, None)
    q, k, v = fused.rope_qkv(qkv, cos_sin, positions, kv_heads, head_dim, (q_norm, k_norm), 1e-6)
    expected = fused.write_kv(k, v, pool, layer, slots)
    own, own_pool = qkv.clone(), pool.clone()
    rope_write_kv(own, cos_sin, positions, own_pool, layer, slots, q_norm=q_norm, k_norm=k_norm)
    close(own[:, : q_heads * head_dim], q.flatten(1))
    assert torch.equal(own[:, q_heads * head_dim :], qkv[:, q_heads * head_dim :]), "k and v stay as they were"
    close(own_pool, expected, {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype])
    assert torch.equal(own_pool[:, [0, 2]], pool[:, [0, 2]]), "another layer was touched"


def test_a_row_has_the_same_bits_whatever_is_around_it() -> None:
    x, weight = torch.randn(500, 576), torch.randn(576)
    norm, activated = rms_norm(x, weight, 1e-5), silu_mul(x)
    qkv, cos_sin, positions = torch.randn(500, 10 * 64), torch.randn(600, 64), torch.randint(0, 600, (500,))
    whole, pool, slots = qkv.clone(), torch.zeros(40, 1, 2, 2, 16, 64), torch.randperm(640)[:500]
    rope_write_kv(whole, cos_sin, positions, pool, 0, slots)
    for rows in ([0], [499], [3, 7, 100], list(range(17, 300))):
        assert torch.equal(rms_norm(x[rows], weight, 1e-5), norm[rows])
        assert torch.equal(silu_mul(x[rows]), activated[rows])
        part, other = qkv[rows], torch.zeros_like(pool)
        rope_write_kv(part, cos_sin, positions[rows], other, 0, slots[rows])
        assert torch.equal(part, whole[rows])
        blocks, offsets = slots[rows] // 16, slots[rows] % 16
        assert torch.equal(other[blocks, 0, :, :, offsets], pool[blocks, 0, :, :, offsets])
