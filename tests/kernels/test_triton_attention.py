"""The Triton attention ops against float64, over shapes and settings drawn at random, with poisoned memory."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from triton_ground import BOUNDS, DEVICE, INTERPRETED, ROUNDS, assert_close, assert_same_lse, here, only_here, paged

from spillway.kernels.errors import KernelDtypeError, KernelShapeError, KernelValueError
from spillway.kernels.params import AttentionParams
from spillway.kernels.reference import attention as reference

pytestmark = only_here()
if INTERPRETED or torch.cuda.is_available():
    from spillway.kernels import ops

FP8, INT8 = torch.float8_e4m3fn, torch.int8
# An example under the interpreter takes up to a second: shrinking one would take minutes, so its seed must do.
quick = settings(
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Setting:
    """One drawn attention problem, without its lengths."""

    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype
    pool_dtype: torch.dtype
    features: dict[str, Any]
    seed: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.kv_heads, self.block_tokens, self.head_dim

    def queries(self, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(rows, self.query_heads, self.head_dim, generator=generator).to(self.dtype)

    def params(self, device: str, **changes: Any) -> AttentionParams:
        generator = torch.Generator().manual_seed(self.seed + 2)
        features = {**self.features, **changes}
        if features.pop("alibi", False):
            slopes = torch.rand(self.query_heads, generator=generator) * 0.1
            features["alibi_slopes"] = slopes.to(device)
        if self.pool_dtype in (FP8, INT8):
            scales = torch.rand(2, self.kv_heads, generator=generator) * 0.05 + 0.01
            features["kv_scales"] = scales.to(device)
        return AttentionParams(scale=self.head_dim**-0.5, **features)

    @property
    def bound(self) -> float:
        # fp8 pools are multiplied in fp16 where q is 16 bits wide: bfloat16's bound covers that
        return BOUNDS[self.dtype]


@st.composite
def drawn_settings(draw: st.DrawFn) -> Setting:
    group = draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    kv_heads = draw(st.sampled_from([1, 2] if group > 2 else [1, 2, 3]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    wider = [torch.bfloat16, torch.float16] if dtype is torch.float32 else []
    features: dict[str, Any] = {}
    if draw(st.booleans()):
        features["window"] = draw(st.integers(1, 90))
        features["sinks"] = draw(st.sampled_from([0, 1, 4, 40]))
    if draw(st.integers(0, 3)) == 0:
        features["soft_cap"] = draw(st.sampled_from([0.5, 5.0, 30.0]))
    if draw(st.integers(0, 3)) == 0:
        features["alibi"] = True
    return Setting(
        query_heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 32, 64, 80, 96, 128, 256])),
        block_tokens=draw(st.sampled_from([16, 32, 64])),
        dtype=dtype,
        pool_dtype=draw(st.sampled_from([dtype, dtype, dtype, FP8, INT8, *wider])),
        features=features,
        seed=draw(st.integers(0, 2**31)),
    )


def poisoned(rows: int, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (rows, setting.query_heads)
    out = torch.full((*shape, setting.head_dim), torch.nan, dtype=setting.dtype, device=DEVICE)
    return out, torch.full(shape, torch.nan, device=DEVICE)


@given(drawn_settings(), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=4))
@settings(quick, max_examples=12 * ROUNDS)
def test_prefill_of_ragged_chunks_is_exact(setting: Setting, pieces: list[tuple[int, int]]) -> None:
    earlier, chunks = [a for a, _ in pieces], [b for _, b in pieces]
    lens = [a + b for a, b in zip(earlier, chunks, strict=True)]
    kv = paged(lens, setting.shape, setting.pool_dtype, setting.seed)
    q = setting.queries(sum(chunks))
    starts = torch.tensor([0, *chunks]).cumsum(0).int()
    out, lse = poisoned(len(q), setting)
    pool, tables, context = kv.here
    got = ops.flash_prefill(here(q), pool, 1, tables, here(starts), context, setting.params(DEVICE), out=out, lse=lse)
    assert got is out
    wanted, wanted_lse = reference.flash_prefill(
        q, kv.pool, 1, kv.tables, starts, kv.context_lens, setting.params("cpu")
    )
    assert_close(out, wanted, setting.bound)
    assert_same_lse(lse, wanted_lse)


@given(drawn_settings(), st.lists(st.integers(0, 400), min_size=1, max_size=5))
@settings(quick, max_examples=10 * ROUNDS)
def test_decode_is_exact(setting: Setting, lens: list[int]) -> None:
    kv = paged(lens, setting.shape, setting.pool_dtype, setting.seed)
    q = setting.queries(len(lens))
    out, lse = poisoned(len(q), setting)
    pool, tables, context = kv.here
    ops.paged_decode(here(q), pool, 2, tables, context, setting.params(DEVICE), out=out, lse=lse)
    wanted, wanted_lse = reference.paged_decode(q, kv.pool, 2, kv.tables, kv.context_lens, setting.params("cpu"))
    assert_close(out, wanted, setting.bound)
    assert_same_lse(lse, wanted_lse)


@given(drawn_settings(), st.integers(0, 6), st.lists(st.integers(0, 70), min_size=1, max_size=4))
@settings(quick, max_examples=7 * ROUNDS)
def test_cascade_is_decode_with_the_prefix_read_once(setting: Setting, blocks: int, tails: list[int]) -> None:
    shared = blocks * setting.block_tokens
    lens = [shared + tail for tail in tails]
    kv = paged(lens, setting.shape, setting.pool_dtype, setting.seed, shared_blocks=blocks)
    q = setting.queries(len(lens))
    out, lse = poisoned(len(q), setting)
    pool, tables, context = kv.here
    ops.cascade_decode(here(q), pool, 0, tables, context, shared, setting.params(DEVICE), out=out, lse=lse)
    wanted, wanted_lse = reference.paged_decode(q, kv.pool, 0, kv.tables, kv.context_lens, setting.params("cpu"))
    assert_close(out, wanted, setting.bound)
    assert_same_lse(lse, wanted_lse)


@given(drawn_settings(), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 40)), min_size=1, max_size=3))
@settings(quick, max_examples=5 * ROUNDS)
def test_score_sums_add_up_what_each_token_received(setting: Setting, pieces: list[tuple[int, int]]) -> None:
    chunks = [b for _, b in pieces]
    lens = [a + b for a, b in pieces]
    kv = paged(lens, setting.shape, setting.pool_dtype, setting.seed)
    q = setting.queries(sum(chunks))
    starts = torch.tensor([0, *chunks]).cumsum(0).int()
    cpu = setting.params("cpu")
    _, lse = reference.flash_prefill(q, kv.pool, 1, kv.tables, starts, kv.context_lens, cpu)
    before = torch.rand(len(lens), setting.kv_heads, max(lens) + 9)
    wanted = reference.score_sums(q, kv.pool, 1, kv.tables, starts, kv.context_lens, cpu, before)
    pool, tables, context = kv.here
    sums = here(before)
    params = setting.params(DEVICE)
    ops.score_sums(here(q), pool, 1, tables, here(starts), context, lse.float().to(DEVICE), params, sums)
    assert_close(sums, wanted, setting.bound)


def long_setting(**features: Any) -> Setting:
    return Setting(4, 2, 64, 16, torch.float32, torch.float32, features, seed=5)


@pytest.mark.parametrize("features", [{}, {"window": 700, "sinks": 3}], ids=["plain", "window"])
def test_a_long_context_is_split_and_merged(features: dict[str, Any]) -> None:
    setting = long_setting(**features)
    kv = paged([1500, 0, 257, 256, 900], setting.shape, torch.float32, seed=3)
    q = setting.queries(5)
    out, lse = poisoned(5, setting)
    pool, tables, context = kv.here
    ops.paged_decode(here(q), pool, 1, tables, context, setting.params(DEVICE), out=out, lse=lse)
    wanted, wanted_lse = reference.paged_decode(q, kv.pool, 1, kv.tables, kv.context_lens, setting.params("cpu"))
    assert_close(out, wanted, 1e-5)
    assert_same_lse(lse, wanted_lse, 1e-4)


def test_a_row_is_the_same_to_the_bit_whatever_shares_its_batch() -> None:
    setting = long_setting()
    kv = paged([700, 30, 1100, 5], setting.shape, torch.float32, seed=4)
    q = setting.queries(4).to(DEVICE)
    pool, tables, context = kv.here
    together = ops.paged_decode(q, pool, 1, tables, context, setting.params(DEVICE))
    for row in range(4):
        one = slice(row, row + 1)
        own = tables[one, : -(-int(context[row]) // setting.block_tokens)]  # a table as wide as it must be
        alone = ops.paged_decode(q[one], pool, 1, own, context[one], setting.params(DEVICE))
        assert torch.equal(alone, together[one])


@pytest.mark.skipif(INTERPRETED, reason="minutes under the interpreter")
@pytest.mark.parametrize("features", [{}, {"window": 9000, "sinks": 3}], ids=["plain", "window"])
def test_spans_grow_where_a_context_would_have_too_many(features: dict[str, Any]) -> None:
    setting = long_setting(**features)
    kv = paged([20_000, 8192, 8193, 70], setting.shape, torch.float32, seed=7)
    q = setting.queries(4)
    out, lse = poisoned(4, setting)
    pool, tables, context = kv.here
    ops.paged_decode(here(q), pool, 1, tables, context, setting.params(DEVICE), out=out, lse=lse)
    wanted, wanted_lse = reference.paged_decode(q, kv.pool, 1, kv.tables, kv.context_lens, setting.params("cpu"))
    assert_close(out, wanted, 1e-5)
    assert_same_lse(lse, wanted_lse, 1e-4)
    alone, alone_lse = poisoned(1, setting)
    narrow = tables[1:2, :512]
    ops.paged_decode(here(q)[1:2], pool, 1, narrow, context[1:2], setting.params(DEVICE), out=alone, lse=alone_lse)
    assert torch.equal(alone, out[1:2])


def test_rows_of_a_fused_projection_are_read_and_written_in_place() -> None:
    setting = long_setting()
    kv = paged([40, 9], setting.shape, torch.float32, seed=6)
    fused = torch.randn(2, 8, 64)
    wanted, _ = reference.paged_decode(fused[:, :4], kv.pool, 1, kv.tables, kv.context_lens, setting.params("cpu"))
    rows = here(fused)
    pool, tables, context = kv.here
    ops.paged_decode(rows[:, :4], pool, 1, tables, context, setting.params(DEVICE), out=rows[:, 4:])
    assert_close(rows[:, 4:], wanted, 1e-5)
    assert torch.equal(rows[:, :4].cpu(), fused[:, :4])


def test_offsets_go_past_two_to_the_31_elements() -> None:
    # int8, so that this is 2 GiB of address space; only the pages of three blocks are ever touched on a CPU.
    blocks, shape = 2**20 + 40, (1, 16, 64)
    pool = torch.empty(blocks, 1, 2, *shape, dtype=torch.int8, device=DEVICE)
    assert pool.numel() > 2**31
    small = torch.randint(-100, 100, (3, 1, 2, *shape), dtype=torch.int8)
    far = torch.tensor([blocks - 1, 2**20 + 3, 7])
    pool[here(far)] = here(small)
    tables = far.int()[None]
    lens = torch.tensor([45], dtype=torch.int32)
    q = torch.randn(1, 2, 64)
    params = AttentionParams(scale=0.01)
    wanted, _ = reference.paged_decode(q, small, 0, torch.tensor([[0, 1, 2]]), lens, params)
    got = ops.paged_decode(here(q), pool, 0, here(tables), here(lens), params)
    assert_close(got, wanted, 1e-5)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    got = ops.flash_prefill(here(q), pool, 0, here(tables), starts, here(lens), params)
    assert_close(got, wanted, 1e-5)
    k = torch.full((1, 1, 64), 5.0, device=DEVICE)
    slot = torch.tensor([(blocks - 2) * 16 + 3], device=DEVICE)
    ops.write_kv(k, k + 1, pool, 0, slot)
    assert (pool[blocks - 2, 0, 0, 0, 3] == 5).all()
    assert (pool[blocks - 2, 0, 1, 0, 3] == 6).all()


@pytest.mark.skipif(INTERPRETED, reason="graphs are CUDA's")
def test_a_captured_decode_serves_any_lengths() -> None:
    setting = Setting(8, 2, 128, 16, torch.bfloat16, torch.bfloat16, {}, seed=9)
    kv = paged([900, 20, 300], setting.shape, torch.bfloat16, seed=8)
    q, params = setting.queries(3).to(DEVICE), setting.params(DEVICE)
    pool, tables, context = kv.here
    ops.paged_decode(q, pool, 1, tables, context, params)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.paged_decode(q, pool, 1, tables, context, params)
    for lens in ([900, 20, 300], [17, 1, 0], [512, 20, 256]):
        context.copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        wanted, _ = reference.paged_decode(q.cpu(), kv.pool, 1, kv.tables, torch.tensor(lens), setting.params("cpu"))
        assert_close(out, wanted, setting.bound)


def test_what_does_not_fit_together_is_told() -> None:
    setting = long_setting()
    kv = paged([40], setting.shape, torch.float32, seed=1)
    q, params = setting.queries(1).to(DEVICE), setting.params(DEVICE)
    pool, tables, context = kv.here
    with pytest.raises(KernelShapeError, match="does not fit the pool"):
        ops.paged_decode(q[:, :3], pool, 0, tables, context, params)
    with pytest.raises(KernelDtypeError, match="float32 takes queries"):
        ops.paged_decode(q.half(), pool, 0, tables, context, params)
    with pytest.raises(KernelDtypeError, match="int32"):
        ops.paged_decode(q, pool, 0, tables.long(), context, params)
    with pytest.raises(KernelShapeError, match="contiguous"):
        ops.paged_decode(q, pool[..., :32], 0, tables, context, params)
    with pytest.raises(KernelShapeError, match="at most 256"):
        ops.paged_decode(q.new_zeros(1, 4, 512), pool.new_zeros(4, 1, 2, 2, 16, 512), 0, tables, context, params)
    with pytest.raises(KernelValueError, match="whole blocks"):
        ops.cascade_decode(q, pool, 0, tables, context, 9, params)
    with pytest.raises(KernelShapeError, match="lse"):
        ops.paged_decode(q, pool, 0, tables, context, params, lse=torch.zeros(2, 4, device=DEVICE))
