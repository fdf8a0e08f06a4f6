"""The Triton ops that are not attention: writes, norms, block moves, codes, merging, sampling."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from triton_ground import BOUNDS, DEVICE, INTERPRETED, ROUNDS, assert_close, assert_same_lse, here, only_here

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.quantization import QuantFormat, quantized_block_bytes
from spillway.kernels.reference import attention as reference_attention
from spillway.kernels.reference import fused as reference
from spillway.kernels.reference import quantize as reference_codes

pytestmark = only_here()
if INTERPRETED or torch.cuda.is_available():
    from spillway.kernels import ops

FP8, INT8 = torch.float8_e4m3fn, torch.int8
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
quick = settings(deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [96, 576, 1030])
def test_rms_norm_with_and_without_the_residual(dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    residual = torch.randn(5, width).to(dtype)
    out = torch.full_like(x, torch.nan, device=DEVICE)
    ops.rms_norm(here(x), here(weight), 1e-5, out=out)
    assert_close(out, reference.rms_norm(x, weight, 1e-5)[0], BOUNDS[dtype])
    added, rows = here(residual), here(x)
    got = ops.rms_norm(rows, here(weight), 1e-5, residual=added, out=rows)
    wanted, wanted_sum = reference.rms_norm(x, weight, 1e-5, residual)
    assert got is rows
    assert_close(got, wanted, BOUNDS[dtype])
    assert torch.equal(added.cpu(), wanted_sum)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [7, 1024, 1500])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    gate_up = (torch.randn(3, 2 * width) * 4).to(dtype)
    out = torch.full((3, width), torch.nan, dtype=dtype, device=DEVICE)
    ops.silu_mul(here(gate_up), out=out)
    assert_close(out, reference.silu_mul(gate_up), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8, INT8])
def test_blocks_are_copied_gathered_and_scattered_to_the_bit(dtype: torch.dtype) -> None:
    pool = torch.randint(0, 256, (9, 2, 2, 3, 16, 40), dtype=torch.uint8).to(DEVICE)
    pool = (pool.repeat(1, 1, 1, 1, 1, dtype.itemsize)).view(dtype)  # any bits, NaN included
    bits = pool.view(torch.uint8)
    before = bits.clone()
    ids = torch.tensor([4, 0, 8], device=DEVICE)
    staging = torch.zeros(3, *pool.shape[1:], dtype=torch.uint8, device=DEVICE)[..., :40].contiguous()
    staging = staging.repeat(1, 1, 1, 1, 1, dtype.itemsize).view(dtype)
    ops.gather_blocks(pool, ids, staging)
    assert torch.equal(staging.view(torch.uint8), before[ids])
    ops.copy_blocks(pool, ids, torch.tensor([1, 2, 5], device=DEVICE))
    assert torch.equal(bits[[1, 2, 5]], before[ids])
    assert torch.equal(bits[[0, 3, 4, 6, 7, 8]], before[[0, 3, 4, 6, 7, 8]])
    ops.scatter_blocks(pool, torch.tensor([3, 6, 7], device=DEVICE), staging)
    assert torch.equal(bits[[3, 6, 7]], before[ids])
    ops.gather_blocks(pool, ids[:0], staging[:0])  # nothing to do


@pytest.mark.parametrize("dtype", FLOATS)
def test_states_merge_whatever_a_side_that_saw_nothing_holds(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 3, 80).to(dtype), torch.randn(5, 3, 80).to(dtype)
    lse_a, lse_b = torch.randn(5, 3) * 3, torch.randn(5, 3) * 3
    lse_a[0] = lse_b[1] = lse_a[2] = lse_b[2] = -torch.inf
    wanted, wanted_lse = reference_attention.merge_states(a, lse_a, b, lse_b)
    poisoned_a = a.clone()
    poisoned_a[0] = torch.nan
    sides = [here(tensor) for tensor in (poisoned_a, lse_a, b, lse_b)]
    out, lse = ops.merge_states(*sides, out=sides[0], lse=sides[1])  # in place of one side
    assert_close(out, wanted.nan_to_num(), BOUNDS[dtype])
    assert (out[2] == 0).all()
    assert_same_lse(lse, wanted_lse, 1e-5)


def steps(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of a stored dtype, around value."""
    if dtype is INT8:
        return torch.ones_like(value)
    mantissa = {FP8: 3, torch.bfloat16: 7, torch.float16: 10, torch.float32: 20}[dtype]
    smallest = {FP8: -6, torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}[dtype]
    return 2.0 ** (torch.floor(torch.log2(value.abs().clamp(min=2.0**smallest))) - mantissa)


def assert_stored(pool: torch.Tensor, wanted: torch.Tensor, slack: float = 0.0) -> None:
    """Every value is the nearest one its dtype has (a near tie may fall either way), saturated where it must."""
    limit = {FP8: 448.0, INT8: 127.0}.get(pool.dtype, torch.inf)
    wanted = wanted.clamp(-128.0 if pool.dtype is INT8 else -limit, limit)
    error = (pool.cpu().double() - wanted).abs()
    assert (error <= 0.5001 * steps(wanted, pool.dtype) + 1e-5 * wanted.abs() + slack).all()


POOLS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
         (torch.bfloat16, FP8), (torch.float32, INT8), (torch.float32, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "pool_dtype"), POOLS)
@pytest.mark.parametrize("scaled", [False, True])
def test_write_kv_rounds_to_nearest_and_skips_negative_slots(
    dtype: torch.dtype, pool_dtype: torch.dtype, scaled: bool
) -> None:
    pool = torch.zeros(7, 2, 2, 3, 16, 80).to(pool_dtype)
    k, v = (torch.randn(4, 3, 80) * 3).to(dtype), torch.randn(4, 3, 80).to(dtype)
    slots = torch.tensor([3, 20, -1, 7 * 16 - 1])
    scales = torch.rand(2, 3) * 0.02 + 0.005 if scaled else None
    wanted = reference.write_kv(k, v, pool.float(), 1, slots, scales)
    written = here(pool)
    ops.write_kv(here(k), here(v), written, 1, here(slots), kv_scales=None if scales is None else here(scales))
    assert_stored(written, wanted)
    assert (written[:, 0].float() == 0).all()


@given(
    st.sampled_from(POOLS),
    st.sampled_from([(64, 64), (80, 80), (80, 32), (128, 128), (96, 48)]),
    st.sampled_from([(4, 1), (6, 3), (11, 1), (9, 9)]),
    st.booleans(),
    st.booleans(),
)
@settings(quick, max_examples=7 * ROUNDS)
def test_rope_write_kv_finishes_queries_and_writes_keys(
    dtypes: tuple[torch.dtype, torch.dtype], dims: tuple[int, int], heads: tuple[int, int], norms: bool, scaled: bool
) -> None:
    (dtype, pool_dtype), (head_dim, rotated), (query_heads, kv_heads) = dtypes, dims, heads
    qkv = torch.randn(5, (query_heads + 2 * kv_heads) * head_dim).to(dtype)
    table, positions = torch.randn(50, rotated), torch.randint(0, 50, (5,))
    slots = torch.tensor([3, 20, -1, 63, 33])
    pool = torch.zeros(4, 2, 2, kv_heads, 16, head_dim).to(pool_dtype)
    q_norm, k_norm = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if norms else (None, None)
    scales = torch.rand(2, kv_heads) * 0.05 + 0.01 if scaled else None
    q, k, v = reference.rope_qkv(qkv, table, positions, kv_heads, head_dim, (q_norm, k_norm), 1e-5)
    wanted = reference.write_kv(k, v, pool.float(), 1, slots, scales)
    rows, written = here(qkv), here(pool)
    ops.rope_write_kv(
        rows, here(table), here(positions), written, 1, here(slots),
        q_norm=None if q_norm is None else here(q_norm), k_norm=None if k_norm is None else here(k_norm),
        eps=1e-5, kv_scales=None if scales is None else here(scales),
    )  # fmt: skip
    assert_close(rows.view(5, -1, head_dim)[:, :query_heads], q, BOUNDS[dtype])
    assert torch.equal(rows[:, query_heads * head_dim :].cpu(), qkv[:, query_heads * head_dim :])
    # rotation in float32 moves a value a little before it is rounded
    assert_stored(written, wanted, 1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("quant_format", list(QuantFormat))
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 16, 64), torch.bfloat16), ((1, 1, 32, 80), torch.float32), ((1, 1, 16, 256), torch.float32)],
)
def test_codes_mean_what_the_definition_says(
    quant_format: QuantFormat, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    layers, *rest = shape
    blocks = torch.randn(2, layers, 2, *rest)
    blocks[..., 3] *= 20  # an outlier channel, as keys have
    blocks[0, :, 1] = 0.25  # groups without spread
    blocks = blocks.to(dtype)
    packed = torch.full((2, quantized_block_bytes(blocks.shape[1:], quant_format)), 0xAB, dtype=torch.uint8)
    packed = ops.quantize(here(blocks), quant_format, out=here(packed))
    out = torch.full(blocks.shape, torch.nan, device=DEVICE)
    ops.dequantize(packed, quant_format, out)
    wanted = reference_codes.quantize_values(blocks, quant_format)
    assert_close(out, wanted, 1e-3)  # a scale may fall to the neighbouring float16
    narrow = torch.full(blocks.shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
    ops.dequantize(packed, quant_format, narrow)
    assert torch.equal(narrow.cpu(), out.cpu().bfloat16())


def drawn(row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """The obvious way: sort, cut, invert."""
    if temperature == 0:
        return int(row.argmax())
    weights, ids = torch.sort(torch.exp((row.double() - row.max()) / temperature), descending=True, stable=True)
    weights = weights[: top_k or None]
    if top_p < 1:
        before = weights.cumsum(0) - weights
        weights = weights[: max(int((before < top_p * weights.sum()).sum()), 1)]
    weights = torch.where(weights >= min_p * weights.max(), weights, 0.0)
    reached = weights.cumsum(0)
    return int(ids[min(int((reached <= uniform * reached[-1]).sum()), int(weights.nonzero()[-1]))])


def test_sampling_draws_what_sorting_would() -> None:
    generator = torch.Generator().manual_seed(11)

    def uniform(n: int) -> torch.Tensor:
        return torch.rand(n, generator=generator)

    rows, vocabulary = 9 * ROUNDS, 520
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    logits[3] = torch.randint(0, 5, (vocabulary,), generator=generator).float()  # many ties, at the edges too
    logits[5] = 0
    logits[6, 10:] = -torch.inf
    temperature = uniform(rows) * 2 + 0.1
    temperature[0] = 0
    top_k = torch.randint(0, 50, (rows,), generator=generator).int()
    top_k[::3] = 0
    top_k[1] = 1
    top_p = uniform(rows)
    top_p[::4] = 1
    top_p[7] = 0
    min_p = torch.where(uniform(rows) < 0.5, uniform(rows) * 0.3, 0.0)
    each = (temperature, top_k, top_p, min_p, uniform(rows))
    out = torch.full((rows,), -7, device=DEVICE)
    ops.sample(here(logits), ops.SampleSettings(*(here(tensor) for tensor in each)), out=out)
    wanted = [drawn(logits[i], *(tensor[i].item() for tensor in each)) for i in range(rows)]
    same = sum(a == b for a, b in zip(out.tolist(), wanted, strict=True))
    # float32 sums may cut at the neighbour where a target falls on the boundary of two tokens: hardly ever
    assert same >= rows - (0 if INTERPRETED else 1)


def test_a_row_that_is_not_numbers_gives_no_token() -> None:
    logits = torch.randn(4, 20)
    logits[0, 5], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    ones = torch.ones(4, device=DEVICE)
    tokens = ops.sample(here(logits), ops.SampleSettings(ones, ones.int(), ones, ones * 0, ones * 0))
    assert tokens.tolist() == [-1, -1, -1, int(logits[3].argmax())]


def test_what_does_not_fit_together_is_told() -> None:
    x = torch.zeros(2, 8, device=DEVICE)
    pool = torch.zeros(2, 1, 2, 1, 16, 8, device=DEVICE)
    k = torch.zeros(1, 1, 8, device=DEVICE)
    with pytest.raises(KernelShapeError, match="weight"):
        ops.rms_norm(x, torch.ones(9, device=DEVICE), 1e-6)
    with pytest.raises(KernelShapeError, match="gate_up"):
        ops.silu_mul(torch.zeros(2, 9, device=DEVICE))
    with pytest.raises(KernelDtypeError, match="int64"):
        ops.write_kv(k, k, pool, 0, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    with pytest.raises(KernelDtypeError, match="but v is"):
        ops.write_kv(k, k.half(), pool, 0, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    with pytest.raises(KernelShapeError, match="staging"):
        ops.gather_blocks(pool, torch.zeros(2, dtype=torch.int64, device=DEVICE), pool[:1])
    with pytest.raises(KernelShapeError, match="packed"):
        ops.quantize(pool, QuantFormat.INT8, out=torch.zeros(2, 5, dtype=torch.uint8, device=DEVICE))
