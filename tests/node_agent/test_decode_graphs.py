"""What a decode step looks like to a CUDA graph: buckets, idle rows, buffers that stay. Seen on the CPU's kernels."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_loop import BLOCK_TOKENS, Chunk, Run, make_batch, make_pool

from spillway.node_agent.batch import StepBatch
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.graphs import StepInputs, bucket_of, graphs_wanted
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.models.weights import LoadOptions

CPU = torch.device("cpu")


@given(st.integers(1, 5000))
def test_a_bucket_is_the_next_power_of_two(rows: int) -> None:
    bucket = bucket_of(rows)
    assert bucket >= rows
    assert bucket & (bucket - 1) == 0
    assert bucket // 2 < rows


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Callable[..., Path]) -> Decoder:
    return Decoder.load(Checkpoint.open(tiny_checkpoint("llama")), LoadOptions(CPU, torch.float32))


def decodes(lengths: list[int], seed: int) -> list[Run]:
    """One sequence of each length, its last token still to be run, in shuffled blocks."""
    chooser = random.Random(seed)
    needed = [-(-length // BLOCK_TOKENS) for length in lengths]
    ids = chooser.sample(range(sum(needed)), sum(needed))
    return [
        Run([chooser.randrange(6, 300) for _ in range(length)], 1, [ids.pop() for _ in range(count)], length - 1)
        for length, count in zip(lengths, needed, strict=True)
    ]


def filled_pool(decoder: Decoder, blocks: int) -> torch.Tensor:
    return torch.randn(make_pool(decoder, blocks).shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("lengths", [[9], [3, 30, 17], [5] * 5, [1, 2, 3, 4, 5, 6, 7, 40]])
def test_a_step_padded_with_idle_rows_is_the_step(decoder: Decoder, lengths: list[int]) -> None:
    inputs = StepInputs(rows=8, width=12, device=CPU)
    pool = filled_pool(decoder, 40)
    # What an earlier, larger step leaves in the buffers must not matter.
    inputs.fill(make_batch(decodes([40, 33, 12, 7, 8, 9, 20, 1], seed=1), []))
    batch = make_batch(decodes(lengths, seed=2), [])
    plain_pool = pool.clone()
    wanted = decoder.forward(batch, plain_pool).clone()
    assert inputs.take(batch)
    bucket = inputs.fill(batch)
    assert bucket == bucket_of(len(lengths))
    got = decoder.with_scratch(8).forward(inputs.batch(bucket), pool)
    assert got.shape[0] == bucket
    assert torch.equal(got[: len(lengths)], wanted)
    assert torch.equal(pool, plain_pool), "an idle row wrote to the pool"


def test_buffers_stay_where_they_are(decoder: Decoder) -> None:
    inputs = StepInputs(rows=8, width=12, device=CPU)

    def addresses(batch: StepBatch) -> list[int]:
        return [each.data_ptr() for each in (batch.token_ids, batch.positions, batch.slots, batch.decode_block_tables)]

    before = addresses(inputs.batch(8))
    for lengths in ([3], [9] * 8, [40, 2]):
        inputs.fill(make_batch(decodes(lengths, seed=4), []))
        assert addresses(inputs.batch(bucket_of(len(lengths)))) == before
    pool, apart = filled_pool(decoder, 40), decoder.with_scratch(8)
    first = apart.forward(make_batch(decodes([3], seed=5), []), pool).data_ptr()
    assert apart.forward(make_batch(decodes([3] * 8, seed=5), []), pool).data_ptr() == first
    assert decoder.forward(make_batch(decodes([3], seed=5), []), pool).data_ptr() != first


def test_other_steps_are_not_for_graphs() -> None:
    inputs = StepInputs(rows=4, width=3, device=CPU)
    runs = decodes([9, 5], seed=6)
    batch = make_batch(runs, [])
    assert inputs.take(batch)
    chunk = Chunk(Run(list(range(8)), 8, [30, 31]), 0, 8)
    assert not inputs.take(make_batch(runs, [chunk])), "a prefill beside the decodes"
    assert not inputs.take(make_batch([], [chunk])), "a prefill alone"
    assert not inputs.take(make_batch(decodes([2] * 5, seed=6), [])), "more rows than the largest bucket"
    assert not inputs.take(make_batch(decodes([13], seed=6), [])), "a table wider than the buffer"
    assert not inputs.take(replace(batch, sample_rows=batch.sample_rows[:1])), "a row that is not sampled"


def test_the_environment_can_leave_graphs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPILLWAY_GRAPHS", raising=False)
    assert graphs_wanted()
    monkeypatch.setenv("SPILLWAY_GRAPHS", "off")
    assert not graphs_wanted()
