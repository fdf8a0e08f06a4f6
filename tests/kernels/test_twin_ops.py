"""The rest of the CPU ops against their definitions: merge, score sums, codes, block moves, the plain KV write."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Setting, chunks, make, relative_error, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st

import spillway.kernels.cpu as twin
from spillway.kernels import QuantFormat, quantized_block_bytes
from spillway.kernels.reference import attention as reference
from spillway.kernels.reference import fused
from spillway.kernels.reference.quantize import quantize_values

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
some = settings(deadline=None, max_examples=15)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [64, 80, 7])
def test_merging_two_halves_of_the_keys_gives_the_whole(dtype: torch.dtype, head_dim: int) -> None:
    a, b = torch.randn(2, 9, 5, head_dim).to(dtype)
    lse_a, lse_b = torch.randn(2, 9, 5) * 30
    wanted, wanted_lse = reference.merge_states(a, lse_a, b, lse_b)
    out, lse = twin.merge_states(a, lse_a, b, lse_b)
    assert relative_error(out, wanted) < {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert (lse.double() - wanted_lse).abs().max() < 1e-5
    own, own_lse = a.clone(), lse_a.clone()
    twin.merge_states(own, own_lse, b, lse_b, out=own, lse=own_lse)
    assert torch.equal(own, out)
    assert torch.equal(own_lse, lse)


def test_a_side_that_saw_no_key_is_ignored_whatever_it_holds() -> None:
    nothing, nowhere = torch.full((1, 2, 64), torch.nan), torch.full((1, 2), -torch.inf)
    seen, lse = torch.randn(1, 2, 64), torch.randn(1, 2)
    for merged in (twin.merge_states(seen, lse, nothing, nowhere), twin.merge_states(nothing, nowhere, seen, lse)):
        assert torch.equal(merged[0], seen)
        assert torch.equal(merged[1], lse)
    out, none = twin.merge_states(nothing, nowhere, nothing, nowhere)
    assert torch.equal(out, torch.zeros(1, 2, 64))
    assert torch.equal(none, nowhere)


@some
@given(settings_of(), chunks(longest=500))
def test_score_sums_add_the_attention_that_each_token_receives(
    setting: Setting, lengths: list[tuple[int, int]]
) -> None:
    problem = make(setting, lengths)
    tables = problem.tables.masked_fill(problem.tables == problem.tables.max(), 0)
    pool = problem.pool.nan_to_num()
    lse = torch.empty(problem.q.shape[:2])
    problem.prefill(twin, lse=lse)
    longest = max(context for context, _ in lengths)
    sums = torch.randn(len(lengths), setting.kv_heads, longest + 5)
    before, params = sums.clone(), setting.params()
    rest = (problem.layer, tables, problem.starts, problem.contexts)
    wanted = reference.score_sums(problem.q, pool, *rest, params, sums)
    rest = (problem.layer, problem.tables, problem.starts, problem.contexts)
    assert twin.score_sums(problem.q, problem.pool, *rest, lse, params, sums) is sums
    assert relative_error(sums, wanted) < 1e-5
    for sequence, (context, chunk) in enumerate(lengths):
        assert torch.equal(sums[sequence, :, context:], before[sequence, :, context:])
        added = (sums - before)[sequence, :, :context].double().sum()
        assert added == pytest.approx(chunk * setting.query_heads, rel=1e-4), "weights of a query sum to one"


@some
@given(
    st.sampled_from(list(QuantFormat)),
    st.sampled_from(FLOATS),
    st.sampled_from([64, 80, 96, 128, 256, 66, 10]),
    st.sampled_from([1, 16, 32, 64]),
    st.integers(0, 2**20),
)
def test_codes_are_those_of_the_definition(
    quant_format: QuantFormat, dtype: torch.dtype, head_dim: int, block_tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, 2, 2, block_tokens, head_dim)
    blocks = torch.randn(shape, generator=generator) + 4 * torch.randn(3, 2, 2, 2, 1, head_dim, generator=generator)
    blocks = blocks.to(dtype)
    packed = torch.full((3, quantized_block_bytes(shape[1:], quant_format)), 0xA5, dtype=torch.uint8)
    assert twin.quantize(blocks, quant_format, out=packed) is packed
    assert torch.equal(twin.quantize(blocks, quant_format), packed), "every byte is written"
    values = torch.full(shape, torch.nan)
    assert twin.dequantize(packed, quant_format, values) is values
    assert torch.equal(values, quantize_values(blocks, quant_format).float())
    again = torch.empty(shape[:1] + shape[1:], dtype=dtype)
    twin.dequantize(packed[1:2], quant_format, again[1:2])
    assert torch.equal(again[1], values[1].to(dtype)), "each block's bytes stand alone"


@pytest.mark.parametrize("quant_format", list(QuantFormat))
def test_the_error_of_a_code_is_at_most_half_a_step(quant_format: QuantFormat) -> None:
    """Per group, so a channel of large keys costs its neighbours nothing (KIVI)."""
    blocks = torch.randn(4, 1, 2, 2, 32, 64)
    blocks[:, :, 0, :, :, 5] *= 1000
    values = torch.empty_like(blocks)
    twin.dequantize(twin.quantize(blocks, quant_format), quant_format, values)
    for part, dim in ((0, -2), (1, -1)):
        x, error = blocks[:, :, part], (values - blocks)[:, :, part].abs()
        spread = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)
        if quant_format is QuantFormat.FP8:
            bound = x.abs() / 16 + x.abs().amax(dim, keepdim=True) * 2**-16
        else:
            levels = 15 if quant_format is QuantFormat.INT4 else 255
            bound = (spread + 2e-3 * x.abs().amax(dim, keepdim=True)) / levels * 0.51 + 1e-6
        assert (error <= bound).all()


def test_constant_and_huge_groups_have_codes() -> None:
    blocks = torch.zeros(3, 1, 2, 1, 16, 64)
    blocks[1] = -7.25
    blocks[2] = 60000.0
    for quant_format in QuantFormat:
        values = torch.empty_like(blocks)
        twin.dequantize(twin.quantize(blocks, quant_format), quant_format, values)
        assert torch.isfinite(values).all()
        assert ((values - blocks).abs() <= 1e-2 * blocks.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize(("head_dim", "block_tokens"), [(64, 16), (20, 4)])
def test_write_kv(dtype: torch.dtype, source: torch.dtype, head_dim: int, block_tokens: int) -> None:
    k, v = (torch.randn(2, 41, 3, head_dim) * 5).to(source)
    pool = torch.randn(60, 2, 2, 3, block_tokens, head_dim).to(dtype)
    slots = torch.randperm(60 * block_tokens)[:41]
    slots[[0, 7]] = -1
    scales = torch.tensor([[0.5, 0.1, 1.0], [0.3, 0.7, 0.2]]) if dtype.itemsize == 1 else None
    wanted = fused.write_kv(k, v, pool, 1, slots, scales)
    if dtype is torch.int8:
        wanted = wanted.round().clamp(-128, 127)
    elif dtype is torch.float8_e4m3fn:
        wanted = wanted.clamp(-448, 448)
    got = pool.clone()
    twin.write_kv(k, v, got, 1, slots, kv_scales=scales)
    rounded = wanted.float().to(dtype).double()
    differs = got.double() != rounded
    assert differs.float().mean() < 2e-3, "a tie may fall differently after a division in float32"
    step = {torch.int8: 1.0, torch.float8_e4m3fn: 0.13}.get(dtype, 1e-2)
    assert ((got.double() - rounded).abs() <= step * rounded.abs().clamp(min=1)).all()
    assert torch.equal(got[:, 0].float(), pool[:, 0].float()), "another layer was touched"


def test_every_fp8_number_survives_and_large_ones_saturate() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    finite = numbers[~numbers.isnan()]
    k = torch.cat([finite, torch.tensor([1e9, -1e9])])[None, None, :]
    pool = torch.zeros(1, 1, 2, 1, 1, k.shape[-1]).to(torch.float8_e4m3fn)
    twin.write_kv(k, k, pool, 0, torch.tensor([0]))
    assert torch.equal(pool[0, 0, 0, 0, 0].float(), torch.cat([finite, torch.tensor([448.0, -448.0])]))
    midway = torch.linspace(-460, 460, 4001)[None, None, :]
    pool = torch.zeros(1, 1, 2, 1, 1, 4001).to(torch.float8_e4m3fn)
    twin.write_kv(midway, midway, pool, 0, torch.tensor([0]))
    assert torch.equal(pool[0, 0, 1, 0, 0].float(), midway[0, 0].clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_blocks_move(dtype: torch.dtype) -> None:
    pool = (torch.randn(12, 3, 2, 2, 16, 40) * 50).to(dtype)
    ids = torch.tensor([7, 0, 11, 3])
    staging = torch.zeros(4, *pool.shape[1:], dtype=dtype)
    twin.gather_blocks(pool, ids, staging)
    assert torch.equal(staging, pool[ids])
    target = pool.clone()
    twin.scatter_blocks(target, torch.tensor([1, 2, 10, 5]), staging)
    assert torch.equal(target[[1, 2, 10, 5]], staging)
    untouched = [0, 3, 4, 6, 7, 8, 9, 11]
    assert torch.equal(target[untouched], pool[untouched])
    twin.copy_blocks(pool, torch.tensor([0, 1]), torch.tensor([4, 6]))
    assert torch.equal(pool[[4, 6]], pool[[0, 1]])
    twin.copy_blocks(pool, ids[:0], ids[:0])


def test_large_blocks_move_in_pieces() -> None:
    pool = torch.randn(6, 4, 2, 4, 64, 128)
    staging = torch.empty(3, *pool.shape[1:])
    twin.gather_blocks(pool, torch.tensor([5, 1, 2]), staging)
    assert torch.equal(staging, pool[[5, 1, 2]])
