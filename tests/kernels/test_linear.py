"""The packed linear: within the rounding of one chain of multiply-adds, and the same bits whatever shares the call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spillway.kernels import KernelDtypeError, KernelShapeError, silu_mul
from spillway.kernels.cpu.linear import PackedLinear

SHAPES = [(1, 1), (5, 3), (7, 16), (64, 17), (255, 33), (257, 8), (576, 96), (1030, 130)]  # (in, out)
ROWS = [1, 2, 5, 6, 7, 13, 64, 150]
HALF_ULP = 2.0**-24


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def weight_of(inputs: int, outputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs * 1000 + outputs))


def guarded(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A poisoned output that lies inside a larger tensor, and that tensor."""
    around = torch.full((rows + 2, columns + 21), float("nan"))
    return around[1:-1, 3 : 3 + columns], around


def check_guard(out: Tensor, around: Tensor) -> None:
    assert torch.isfinite(out).all(), "an element was not written"
    assert int(torch.isnan(around).sum()) == around.numel() - out.numel(), "written outside of out"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_error_stays_within_that_of_one_chain(inputs: int, outputs: int, rows: int) -> None:
    weight, bias = weight_of(inputs, outputs), torch.randn(outputs)
    x, residual = torch.randn(rows, inputs), torch.randn(rows, outputs)
    out, around = guarded(rows, outputs)
    assert PackedLinear.pack(weight, bias)(x, out, residual) is out
    check_guard(out, around)
    terms = x.abs().double() @ weight.abs().double().T + bias.abs() + residual.abs()
    expected = x.double() @ weight.double().T + bias + residual
    assert bool(((out - expected).abs() <= (inputs + 2) * HALF_ULP * terms * 1.001).all())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_numbers_come_out_exactly(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> None:
    weight = torch.randint(-8, 9, (outputs, inputs)).to(dtype)
    x = torch.randint(-64, 65, (rows, inputs)).float()
    out, around = guarded(rows, outputs)
    PackedLinear.pack(weight)(x, out)
    check_guard(out, around)
    assert torch.equal(out.double(), x.double() @ weight.double().T)


@pytest.mark.parametrize("inputs", [6, 250, 256])
def test_terms_are_added_in_order_of_k(inputs: int) -> None:
    """Each 1 is lost against 2^24, so any other order of adding shows."""
    row = torch.ones(inputs)
    row[0], row[-3], row[-1] = 2.0**24, -(2.0**24), 0.5
    out = PackedLinear.pack(torch.ones(40, inputs))(row.repeat(9, 1))
    assert bool((out == 1.5).all())


def test_long_sums_are_cut_so_that_they_round_less() -> None:
    """600 inputs are three chains of 200: what comes before and after the chain of 2^24 is not lost against it."""
    row = torch.ones(600)
    row[200], row[399] = 2.0**24, -(2.0**24)
    out = PackedLinear.pack(torch.ones(40, 600))(row.repeat(9, 1))
    assert bool((out == 400).all())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_is_the_same_bits_alone_and_in_any_company(data: st.DataObject) -> None:
    inputs, outputs = data.draw(st.sampled_from([(64, 96), (576, 40), (777, 33), (1536, 24), (40, 2000)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    gated = outputs % 2 == 0 and data.draw(st.booleans())
    linear = PackedLinear.pack(weight_of(inputs, outputs).to(dtype), torch.randn(outputs), gated=gated)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(data.draw(st.integers(1, 400)), inputs)
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    whole = linear(x)
    chosen = torch.randint(0, len(x), (data.draw(st.integers(1, 140)),))
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    assert torch.equal(linear(x[chosen]), whole[chosen])
    row = int(chosen[0])
    assert torch.equal(linear(x[row : row + 1]), whole[row : row + 1])


def test_many_blocks_of_rows_on_many_threads() -> None:
    """More blocks than threads and the reverse: whoever is done helps with another's block."""
    linear = PackedLinear.pack(weight_of(1024, 80))
    x = torch.randn(700, 1024)
    torch.set_num_threads(1)
    expected = linear(x)
    for threads in (2, 3, 7, 16):
        torch.set_num_threads(threads)
        assert torch.equal(linear(x), expected)


def test_bfloat16_weights_stand_for_their_float32_values() -> None:
    weight, bias, x = weight_of(576, 90).bfloat16(), torch.randn(90), torch.randn(50, 576)
    half, full = PackedLinear.pack(weight, bias), PackedLinear.pack(weight.float(), bias)
    assert torch.equal(half(x), full(x))
    assert half.panels.numel() * 2 == full.panels.numel()


@pytest.mark.parametrize("outputs", [2, 22, 64, 98])
def test_gated_is_near_its_definition(outputs: int) -> None:
    weight, bias, x = weight_of(130, outputs), torch.randn(outputs), torch.randn(33, 130) * 3
    out, around = guarded(33, outputs // 2)
    PackedLinear.pack(weight, bias, gated=True)(x, out)
    check_guard(out, around)
    gate, up = (x.double() @ weight.double().T + bias).chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    assert float((out - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("outputs", [32, 96, 160])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gated_is_the_plain_product_followed_by_silu_mul(outputs: int, with_bias: bool) -> None:
    weight, bias = weight_of(130, outputs), torch.randn(outputs) if with_bias else None
    x, residual = torch.randn(33, 130) * 3, torch.randn(33, outputs // 2)
    expected = silu_mul(PackedLinear.pack(weight, bias)(x))
    gated = PackedLinear.pack(weight, bias, gated=True)
    out, around = guarded(33, outputs // 2)
    assert torch.equal(gated(x, out), expected)
    check_guard(out, around)
    assert torch.equal(gated(x, residual=residual), residual + expected)


def test_rows_may_lie_apart_and_the_residual_may_be_the_output() -> None:
    weight = weight_of(96, 50)
    linear = PackedLinear.pack(weight.T.contiguous().T)
    wide, stream = torch.randn(20, 300), torch.randn(20, 50)
    x = wide[::2, 7:103]
    expected = stream[::2] + linear(x.contiguous())
    residual = stream[::2]
    assert linear(x, residual, residual) is residual
    assert torch.equal(residual, expected)
    assert torch.equal(linear(wide[:1, :96]), linear(wide[:1, :96].clone()))


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight = weight_of(37, 20).abs()
    x = torch.randn(8, 37)
    x[2, 36], x[5, 0] = float("inf"), float("nan")
    out = PackedLinear.pack(weight)(x)
    assert bool((out[2] == float("inf")).all())
    assert bool(out[5].isnan().all())
    others = [0, 1, 3, 4, 6, 7]
    assert torch.equal(out[others], PackedLinear.pack(weight)(x[others]))


def test_no_rows() -> None:
    assert PackedLinear.pack(torch.ones(5, 3))(torch.empty(0, 3)).shape == (0, 5)


def test_a_packed_weight_is_a_copy() -> None:
    weight, bias, x = weight_of(30, 16), torch.randn(16), torch.randn(3, 30)
    linear = PackedLinear.pack(weight, bias)
    before = linear(x)
    weight.zero_()
    bias.zero_()
    assert torch.equal(linear(x), before)


def test_bad_input_has_a_type() -> None:
    with pytest.raises(KernelShapeError):
        PackedLinear.pack(torch.ones(3))
    with pytest.raises(KernelShapeError):
        PackedLinear.pack(torch.ones(0, 3))
    with pytest.raises(KernelShapeError):
        PackedLinear.pack(torch.ones(3, 4), gated=True)
    with pytest.raises(KernelShapeError):
        PackedLinear.pack(torch.ones(3, 4), torch.ones(4))
    with pytest.raises(KernelDtypeError):
        PackedLinear.pack(torch.ones(3, 4, dtype=torch.float16))
    linear = PackedLinear.pack(torch.ones(3, 4))
    for x in (torch.ones(2, 5), torch.ones(4), torch.ones(2, 2, 4), torch.ones(4, 2).T):
        with pytest.raises(KernelShapeError):
            linear(x)
    with pytest.raises(KernelDtypeError):
        linear(torch.ones(2, 4, dtype=torch.bfloat16))
    with pytest.raises(KernelShapeError):
        linear(torch.ones(2, 4), out=torch.empty(2, 4))
    with pytest.raises(KernelShapeError):
        linear(torch.ones(2, 4), residual=torch.empty(1, 3))


OTHER_TILES = """
import sys
import llvmlite.binding as llvm

own_features, wide = llvm.get_host_cpu_features, sys.argv[1] == "wide"
llvm.get_host_cpu_features = lambda: {"avx512f": wide}
from spillway.kernels.cpu import linear_layout

llvm.get_host_cpu_features = own_features
assert linear_layout.VECTORS == (2 if wide else 1)
import torch
from spillway.kernels.cpu.jit import entries
from spillway.kernels.cpu.jit.linear import linear

entries.ENTRIES[:] = [linear]
from spillway.kernels.cpu.linear import PackedLinear

calls, results = torch.load(sys.argv[2]), []
for weight, bias, x, gated in calls:
    results.append(PackedLinear.pack(weight, bias, gated=gated)(x))
torch.save(results, sys.argv[3])
"""


@pytest.mark.parametrize("tiles", ["narrow", "wide"])
def test_the_tiles_of_other_processors_give_the_same_bits(tmp_path: Path, tiles: str) -> None:
    """Tiles as for AVX2 and as for AVX-512, both compiled for this processor."""
    shapes = [(5, 3), (255, 33), (576, 96), (1030, 130)]
    calls = [
        (weight_of(inputs, outputs).to(dtype), torch.randn(outputs), torch.randn(rows, inputs), outputs % 2 == 0)
        for inputs, outputs in shapes
        for rows in (1, 12, 40)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    torch.save(calls, tmp_path / "calls")
    command = [sys.executable, "-c", OTHER_TILES, tiles, str(tmp_path / "calls"), str(tmp_path / "results")]
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PATH": "",
    }  # its code must not be taken for this process's
    subprocess.run(command, check=True, timeout=120, env=environment)
    for (weight, bias, x, gated), result in zip(calls, torch.load(tmp_path / "results"), strict=True):
        assert torch.equal(result, PackedLinear.pack(weight, bias, gated=gated)(x))
