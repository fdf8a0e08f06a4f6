"""The CPU attention ops: near float64, and the same bits whatever surrounds a query."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch
from attention_cases import NO_BLOCK, Setting, assert_lse_near, assert_near, chunks, make, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st

import spillway.kernels.cpu as twin

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
many = settings(deadline=None, max_examples=30)
some = settings(deadline=None, max_examples=15)


@many
@given(settings_of(DTYPES), chunks())
def test_prefill_is_near_float64(setting: Setting, lengths: list[tuple[int, int]]) -> None:
    problem = make(setting, lengths)
    out, lse = torch.full_like(problem.q, torch.nan), torch.full(problem.q.shape[:2], torch.nan)
    returned = problem.prefill(twin, out=out, lse=lse)
    wanted, wanted_lse = problem.wanted()
    assert returned is out
    assert_near(out, wanted, setting.dtype)
    assert_lse_near(lse, wanted_lse)


@many
@given(settings_of(DTYPES), chunks(longest=2500))
def test_decode_has_the_bits_of_prefill(setting: Setting, lengths: list[tuple[int, int]]) -> None:
    problem = make(setting, lengths)
    out, lse = torch.full((len(lengths), *problem.q.shape[1:]), torch.nan, dtype=setting.dtype), None
    lse = torch.full(out.shape[:2], torch.nan)
    problem.decode(twin, out=out, lse=lse)
    whole_lse = torch.empty(problem.q.shape[:2])
    whole = problem.prefill(twin, lse=whole_lse)
    assert torch.equal(out, whole[problem.last_rows])
    assert torch.equal(lse, whole_lse[problem.last_rows])


@pytest.mark.parametrize("head_dim", [8, 16, 20, 40, 100])
@pytest.mark.parametrize("block_tokens", [1, 2, 4, 8, 128])
def test_odd_sizes(head_dim: int, block_tokens: int) -> None:
    for features in ({}, {"window": 21, "sinks": 3}):
        problem = make(Setting(6, 2, head_dim, block_tokens, features=features), [(1, 1), (141, 7), (300, 33)])
        wanted, _ = problem.wanted()
        got = problem.prefill(twin)
        assert_near(got, wanted, torch.float32)
        assert torch.equal(problem.decode(twin), got[problem.last_rows])


@some
@given(settings_of(), chunks(), st.randoms(use_true_random=False))
def test_bits_do_not_depend_on_the_batch(setting: Setting, lengths: list[tuple[int, int]], random: Random) -> None:
    problem = make(setting, [*lengths, (513, 5)])
    whole, decoded = problem.prefill(twin), problem.decode(twin)
    order = list(range(len(lengths) + 1))
    random.shuffle(order)
    for sequences in (order, order[:1]):
        part = problem.only(sequences)
        rows = torch.cat([torch.arange(int(problem.starts[s]), int(problem.starts[s + 1])) for s in sequences])
        assert torch.equal(part.prefill(twin), whole[rows])
        assert torch.equal(part.decode(twin), decoded[sequences])


@some
@given(settings_of().filter(lambda s: s.features.get("causal", True)), st.integers(2, 700), st.data())
def test_bits_do_not_depend_on_the_chunking(setting: Setting, context: int, data: st.DataObject) -> None:
    setting = replace(setting, features={k: v for k, v in setting.features.items() if k not in ("window", "sinks")})
    whole = make(setting, [(context, context)])
    wanted = whole.prefill(twin)
    cuts = sorted(data.draw(st.sets(st.integers(1, context - 1), max_size=4)) | {0, context})
    for start, end in pairwise(cuts):
        chunk = replace(
            whole,
            q=whole.q[start:end],
            starts=torch.tensor([0, end - start], dtype=torch.int32),
            contexts=torch.tensor([end], dtype=torch.int32),
        )
        assert torch.equal(chunk.prefill(twin), wanted[start:end])


@some
@given(settings_of(DTYPES), chunks(longest=300))
def test_bits_do_not_depend_on_where_blocks_are_or_how_long(setting: Setting, lengths: list[tuple[int, int]]) -> None:
    setting = replace(setting, features={k: v for k, v in setting.features.items() if k not in ("window", "sinks")})
    problem = make(setting, lengths)
    wanted = problem.prefill(twin)
    order = torch.randperm(len(problem.pool))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    known = problem.tables != NO_BLOCK
    tables = problem.tables.clone()
    tables[known] = place[problem.tables[known].long()].int()
    assert torch.equal(replace(problem, pool=problem.pool[order], tables=tables).prefill(twin), wanted)
    if setting.block_tokens == 32:  # the same tokens in blocks of half the length
        halves = problem.pool.unflatten(4, (2, 16)).movedim(4, 1).flatten(0, 1).contiguous()
        ids = problem.tables.long() * 2
        halved = torch.stack([ids, ids + 1], dim=-1).flatten(1).clamp(max=NO_BLOCK).int()
        assert torch.equal(replace(problem, pool=halves, tables=halved).prefill(twin), wanted)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_do_not_depend_on_the_threads(threads: int) -> None:
    problem = make(Setting(8, 4), [(1700, 40), (3, 3), (260, 200), (1, 1)])
    single = problem.only([0])
    before = torch.get_num_threads()
    wanted, decoded, alone = problem.prefill(twin), problem.decode(twin), single.decode(twin)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(problem.prefill(twin), wanted)
        assert torch.equal(problem.decode(twin), decoded)
        assert torch.equal(single.decode(twin), alone)
    finally:
        torch.set_num_threads(before)


@some
@given(settings_of(DTYPES), st.integers(0, 60), st.integers(1, 5), st.data())
def test_cascade_has_the_bits_of_decode(
    setting: Setting, shared_blocks: int, sequences: int, data: st.DataObject
) -> None:
    setting = replace(setting, features={k: v for k, v in setting.features.items() if k not in ("window", "sinks")})
    bt = setting.block_tokens
    shared = shared_blocks * bt
    own = [data.draw(st.integers(0 if shared else 1, 200)) for _ in range(sequences)]
    problem = make(setting, [(shared + tokens, 1) for tokens in own])
    tables = problem.tables.clone()
    tables[:, :shared_blocks] = tables[0, :shared_blocks].clone()
    windowed = data.draw(st.sampled_from([{}, {"window": 100, "sinks": 20}]))
    problem = replace(problem, tables=tables, setting=replace(setting, features={**setting.features, **windowed}))
    lse, wanted_lse = torch.full((2, sequences, setting.query_heads), torch.nan)
    wanted = problem.decode(twin, lse=wanted_lse)
    params = problem.setting.params()
    rest = (problem.pool, problem.layer, tables, problem.contexts, shared, params)
    got = twin.cascade_decode(problem.q, *rest, lse=lse)
    assert torch.equal(got, wanted)
    assert torch.equal(lse, wanted_lse)


def test_queries_may_be_a_view_of_a_fused_projection() -> None:
    problem = make(Setting(4, 2), [(70, 30), (200, 1)])
    qkv = torch.randn(31, (4 + 2 * 2) * 64)
    view = qkv[:, : 4 * 64].unflatten(1, (4, 64))
    out = torch.full((31, 300), torch.nan)
    strided = replace(problem, q=view)
    strided.prefill(twin, out=out[:, : 4 * 64].unflatten(1, (4, 64)))
    assert torch.equal(out[:, : 4 * 64].reshape(31, 4, 64), replace(problem, q=view.contiguous()).prefill(twin))
    assert out[:, 4 * 64 :].isnan().all()


def test_a_row_without_keys_gives_zeros() -> None:
    problem = make(Setting(4, 2), [(40, 1), (20, 1)])
    problem = replace(problem, contexts=torch.tensor([40, 0], dtype=torch.int32))
    lse = torch.full((2, 4), torch.nan)
    out = problem.decode(twin, lse=lse)
    assert torch.equal(out[1], torch.zeros(4, 64))
    assert torch.equal(lse[1], torch.full((4,), -torch.inf))
    assert not out[0].isnan().any()


def test_an_empty_batch_is_nothing_to_do() -> None:
    problem = make(Setting(4, 2), [(40, 3)])
    nothing = replace(
        problem,
        q=problem.q[:0],
        tables=problem.tables[:0],
        contexts=problem.contexts[:0],
        starts=torch.zeros(1, dtype=torch.int32),
    )
    assert nothing.prefill(twin).shape == (0, 4, 64)
    params = problem.setting.params()
    assert twin.paged_decode(nothing.q, problem.pool, 0, nothing.tables, nothing.contexts, params).shape == (0, 4, 64)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    problem = make(Setting(2, 1), [(400, 400)])
    loud = replace(problem, q=problem.q * 300)
    wanted, wanted_lse = loud.wanted()
    lse = torch.empty(400, 2)
    assert_near(loud.prefill(twin, lse=lse), wanted, torch.float16)
    assert ((lse.double() - wanted_lse).abs() <= 1e-6 * wanted_lse.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_pools_of_bytes_are_scaled_per_head(dtype: torch.dtype) -> None:
    problem = make(Setting(6, 2), [(300, 20), (17, 17)])
    scales = torch.tensor([[0.02, 0.05], [0.03, 0.01]])
    pool = problem.pool.nan_to_num() / scales[:, :, None, None]
    pool = pool.clamp(-127, 127).round().to(dtype) if dtype is torch.int8 else pool.clamp(-448, 448).to(dtype)
    setting = replace(problem.setting, features={"kv_scales": scales})
    stored = replace(problem, pool=pool, setting=setting)
    wanted, _ = stored.wanted()
    got = stored.prefill(twin)
    assert_near(got, wanted, torch.float32)
    assert torch.equal(stored.decode(twin), got[stored.last_rows])


def test_a_pool_of_more_than_2_to_the_31_numbers() -> None:
    setting = Setting(2, 1, 128, 64, torch.bfloat16)
    block = 128 * 2 * 64 * 128
    pool = torch.empty(2**31 // block + 2, 128, 2, 1, 64, 128, dtype=torch.bfloat16)  # touched in a few blocks only
    problem = make(setting, [(150, 150)], layers=1)
    high = torch.tensor([len(pool) - 1, len(pool) - 2, 0], dtype=torch.int32)
    pool[high.long(), 127] = problem.pool[problem.tables[0, :3].long(), 0]
    big = replace(problem, pool=pool, layer=127, tables=high[None])
    assert torch.equal(big.prefill(twin), problem.prefill(twin))
    assert torch.equal(big.decode(twin), problem.decode(twin))
    k, v = torch.randn(2, 2, 1, 128).bfloat16()
    slots = torch.tensor([len(pool) * 64 - 1, 3])
    twin.write_kv(k, v, pool, 127, slots)
    assert torch.equal(pool[-1, 127, :, 0, 63], torch.stack([k[0, 0], v[0, 0]]))
    staging = torch.empty(1, *pool.shape[1:], dtype=torch.bfloat16)
    twin.gather_blocks(pool, torch.tensor([len(pool) - 1]), staging)
    assert torch.equal(staging[0, 127], pool[-1, 127])
