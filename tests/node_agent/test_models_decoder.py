"""What the decoder promises beside its tokens: tensor ranks that add up, narrow dtypes, rows that do not touch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_loop import Chunk, Run, generate, make_batch, make_pool
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from spillway.node_agent.checkpoint import Checkpoint, WeightReader
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.models.errors import ShardError
from spillway.node_agent.models.linear import DenseLinear
from spillway.node_agent.models.shard import WHOLE, TensorShard
from spillway.node_agent.models.weights import LoadOptions

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
PROMPTS = [[9, 30, 200, 41, 77, 300, 12], [100], list(range(50, 75))]


def load(folder: Path, dtype: torch.dtype = torch.float32, shard: TensorShard = WHOLE, **hooks: Any) -> Decoder:
    return Decoder.load(Checkpoint.open(folder), LoadOptions(CPU, dtype, shard), **hooks)


class SumOverThreads:
    """An all-reduce between ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._parts: dict[int, Tensor] = {}

    def of_rank(self, rank: int) -> Callable[[Tensor], None]:
        def all_reduce(tensor: Tensor) -> None:
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            total = torch.stack([self._parts[each] for each in sorted(self._parts)]).sum(0)
            self._barrier.wait()
            tensor.copy_(total)

        return all_reduce


def run_ranks(folder: Path, size: int) -> list[list[Run]]:
    reducer = SumOverThreads(size)
    results: dict[int, list[Run]] = {}

    def run(rank: int) -> None:
        decoder = load(folder, shard=TensorShard(rank, size), all_reduce=reducer.of_rank(rank))
        results[rank] = generate(decoder, PROMPTS, new_tokens=8, chunk_tokens=10)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [results[rank] for rank in range(size)]


@pytest.mark.parametrize(
    ("family", "overrides", "size"),
    [
        ("llama", {}, 2),
        ("llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 385}, 2),
        ("llama", {"num_key_value_heads": 1}, 2),
        ("qwen2", {"num_key_value_heads": 2}, 4),
        ("qwen3", {"num_key_value_heads": 4}, 4),
    ],
    ids=["gqa", "biases-and-odd-vocabulary", "mqa-repeats-its-kv-head", "two-ranks-per-kv-head", "mha-qk-norm"],
)
def test_tensor_ranks_add_up_to_the_whole_model(
    tiny_checkpoint: MakeCheckpoint, family: str, overrides: dict[str, Any], size: int
) -> None:
    folder = tiny_checkpoint(family, **overrides)
    whole = generate(load(folder), PROMPTS, new_tokens=8, chunk_tokens=10)
    for runs in run_ranks(folder, size):
        for one, other in zip(whole, runs, strict=True):
            assert one.tokens == other.tokens
            torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), rtol=1e-4, atol=1e-4)


def test_a_rank_reads_only_its_slices(tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint("llama")
    read = 0
    original = WeightReader.view

    def poisoned(self: WeightReader, name: str) -> Tensor:
        """Everything outside rank 1's part is NaN: reading it would show in the logits."""
        weight = original(self, name).clone()
        nonlocal read
        read += 1
        if "norm" in name:
            return weight
        half = weight.shape[1 if "o_proj" in name or "down_proj" in name else 0] // 2
        weight.narrow(1 if "o_proj" in name or "down_proj" in name else 0, 0, half).fill_(torch.nan)
        return weight

    monkeypatch.setattr(WeightReader, "view", poisoned)
    decoder = load(folder, shard=TensorShard(1, 2), all_reduce=lambda tensor: None)
    assert read > 20
    (run,) = generate(decoder, PROMPTS[:1], new_tokens=1)
    assert torch.isfinite(run.logits[0]).all()


@pytest.mark.parametrize(
    ("shard", "match"),
    [
        (TensorShard(2, 2), "rank 2"),
        (TensorShard(-1, 2), "rank -1"),
        (TensorShard(0, 3), "do not divide by 3"),
        (TensorShard(0, 0), "rank 0"),
    ],
)
def test_a_split_that_does_not_work_out(tiny_checkpoint: MakeCheckpoint, shard: TensorShard, match: str) -> None:
    with pytest.raises(ShardError, match=match):
        load(tiny_checkpoint("llama"), shard=shard)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_narrow_dtypes_follow_the_float32_model_of_the_same_weights(
    tiny_checkpoint: MakeCheckpoint, family: str, dtype: torch.dtype
) -> None:
    folder = tiny_checkpoint(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float().eval()
    (run,) = generate(load(folder, dtype), PROMPTS[2:], new_tokens=1, dtype=dtype)
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPTS[2]])).logits[0, -1]
    error = (run.logits[0] - expected).norm() / expected.norm()
    assert error < (0.02 if dtype == torch.bfloat16 else 0.004)
    assert error > 0, "the narrow dtype was used at all"


def test_weights_stored_narrow_run_as_their_float32_values(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint("llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runs = generate(load(folder), PROMPTS, new_tokens=6)
    for run in runs:
        with torch.no_grad():
            expected = model(torch.tensor([run.tokens[:-1]])).logits[0, run.prompt_length - 1 :]
        torch.testing.assert_close(torch.stack(run.logits), expected, rtol=1e-3, atol=1e-3)


def test_a_step_without_samples_writes_kv_and_gives_no_logits(tiny_checkpoint: MakeCheckpoint) -> None:
    decoder = load(tiny_checkpoint("llama"))
    pool = make_pool(decoder, 8)
    run = Run(list(PROMPTS[2]), len(PROMPTS[2]), [3, 1, 7, 0, 2, 4, 6])
    logits = decoder.forward(make_batch([], [Chunk(run, 0, 10)]), pool)
    assert logits.shape == (0, decoder.spec.vocab)
    written = pool[[3, 1]].movedim(-2, 1)  # [blocks, tokens, ...]
    assert torch.isfinite(written).all()
    assert torch.isfinite(pool[7, :, :, :, :2]).all()
    assert pool[7, :, :, :, 2:].isnan().all()
    assert pool[[0, 2, 4, 5, 6]].isnan().all()


def test_every_row_can_be_sampled_and_a_negative_slot_is_not_written(tiny_checkpoint: MakeCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    decoder, prompt = load(folder), PROMPTS[2]
    pool = make_pool(decoder, 8)
    batch = make_batch([], [Chunk(Run(list(prompt), len(prompt), [3, 1, 7, 0, 2, 4, 6]), 0, len(prompt))])
    logits = decoder.forward(replace(batch, sample_rows=torch.arange(len(prompt))), pool)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    before = pool.clone()
    again = decoder.forward(replace(batch, slots=torch.full_like(batch.slots, -1)), pool)
    assert torch.equal(again[0], logits[-1]), "KV that is there already is used as it is"
    assert torch.equal(pool.isnan(), before.isnan())
    assert torch.equal(pool.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_layer_writes_where_it_is_told(bias: bool) -> None:
    weight, added, x = torch.randn(7, 5), torch.randn(7) if bias else None, torch.randn(3, 5)
    out = torch.full((4, 7), torch.nan)
    result = DenseLinear(weight, added)(x, out[:3])
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(result, functional.linear(x, weight, added))
    assert out[3].isnan().all()
