"""The whole engine on the Triton kernels: on a GPU, or on the CPU under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so `test_engine_interpreted` runs this file again in a
process of its own, with a few small cases; here it is skipped where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_loop import Chunk, Run, make_batch, make_pool
from test_models_token_exact import CASES, NEW_TOKENS, mixed_prompts, reference_tokens

from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.engine import EngineStats
from spillway.node_agent.graphs import CAPTURE_AT_USE, DecodeGraphs
from spillway.node_agent.load import EngineConfig, load_engine
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.models.weights import LoadOptions
from spillway.node_agent.request import Request, RequestOutput, SamplingParams

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        pytest.mark.timeout(900),  # kernels compile on first use
    ]
)
only_cuda = pytest.mark.skipif(INTERPRETED, reason="of CUDA: streams, pinned memory, graphs")

GENERATED, DRAWN = (4, 2) if INTERPRETED else (NEW_TOKENS, 12)
FEW_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 2},
    )
}
GREEDY = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
CONFIG = EngineConfig(
    dtype="float32",
    device=DEVICE,
    block_tokens=16,
    device_kv_bytes=4 << 20,
    host_kv_bytes=0,
    disk_kv_bytes=0,
    disk_dir=None,
    max_batch_tokens=64,
    max_sequences=8,
)


@dataclass(frozen=True)
class Answers:
    """What an engine made of some prompts: the generated tokens of each, and its figures at the end."""

    tokens: list[list[int]]
    stats: EngineStats


def answers(folder: Path, prompts: list[list[int]], params: list[SamplingParams], **changes: Any) -> Answers:
    loaded = load_engine(Checkpoint.open(folder), "0" * 64, replace(CONFIG, **changes))
    engine = loaded.engine
    for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add(Request(number, tuple(prompt), each, order=number))
    tokens: dict[int, list[int]] = {}
    while engine.num_requests:
        for outcome in engine.step():
            assert isinstance(outcome, RequestOutput), outcome
            tokens[outcome.request.id] = outcome.sequences[0].generated
    stats = engine.stats()
    engine.close(keep=False)
    return Answers([tokens[number] for number in range(len(prompts))], stats)


def greedy(folder: Path, prompts: list[list[int]], **changes: Any) -> Answers:
    return answers(folder, prompts, [GREEDY] * len(prompts), **changes)


def prompts_of(vocab: int) -> list[list[int]]:
    """All lengths on a GPU, three short ones under the interpreter; two begin alike in both."""
    prompts = mixed_prompts(vocab)
    return [prompts[0], prompts[3], prompts[3][:9] + prompts[1]] if INTERPRETED else prompts


@pytest.mark.parametrize("case", FEW_CASES if INTERPRETED else CASES)
def test_greedy_tokens_are_those_of_transformers(tiny_checkpoint: Callable[..., Path], case: str) -> None:
    family, overrides = (FEW_CASES if INTERPRETED else CASES)[case]
    folder = tiny_checkpoint(family, **overrides)
    prompts = prompts_of(Checkpoint.open(folder).spec.vocab)
    got = greedy(folder, prompts)
    assert got.tokens == [tokens[:GENERATED] for tokens in reference_tokens(folder, prompts)]
    if not INTERPRETED:
        assert got.stats.graphs is not None
        assert got.stats.graphs.failure is None
        assert got.stats.graphs.replays > 0


def test_drawn_tokens_depend_on_their_request_alone(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", num_hidden_layers=1)
    params = [
        SamplingParams(max_tokens=DRAWN, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True),
        SamplingParams(max_tokens=DRAWN, temperature=1.3, top_k=20, min_p=0.02, seed=8, ignore_eos=True),
        SamplingParams(
            max_tokens=DRAWN, temperature=0.7, seed=9, presence_penalty=1.0, min_tokens=DRAWN, ignore_eos=True
        ),
        SamplingParams(max_tokens=DRAWN, temperature=0.0, logit_bias=((40, 100.0),), ignore_eos=True),
    ]
    prompts = [[5, 9, 200], [17], [8, 30], [6, 7]]
    together = answers(folder, prompts, params).tokens
    for number in (0, 2) if INTERPRETED else range(4):
        assert answers(folder, [prompts[number]], [params[number]]).tokens == [together[number]]
    assert together[3] == [40] * DRAWN
    other_seed = replace(params[0], seed=70)
    assert answers(folder, prompts[:1], [other_seed]).tokens != together[:1]


@only_cuda
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_spilled_blocks_come_back_as_they_were(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    folder = tiny_checkpoint("llama")
    # Short prompts with long answers: they fit a small pool when they start, and have outgrown it when they end.
    prompts = [[(7 * number + place) % 300 + 10 for place in range(10 + number)] for number in range(6)]
    params = [replace(GREEDY, max_tokens=90)] * len(prompts)
    roomy = answers(folder, prompts, params)
    assert roomy.stats.scheduler.preemptions == 0
    block_bytes = 3 * 2 * 2 * 16 * 16 * 4
    monkeypatch.setattr("spillway.node_agent.block_moves.STAGING_BYTES", 3 * block_bytes)  # several parts a move
    below = {"host_kv_bytes": 8 << 20} if tier == "host" else {"disk_kv_bytes": 32 << 20, "disk_dir": tmp_path}
    tight = answers(folder, prompts, params, device_kv_bytes=14 * block_bytes, **below)
    assert tight.tokens == roomy.tokens
    assert tight.stats.scheduler.preemptions > 0
    assert tight.stats.store is not None
    assert sum(each.hits for each in tight.stats.store.tiers.values()) > 0


@only_cuda
def test_steps_are_the_same_with_and_without_graphs(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("qwen3")
    prompts = mixed_prompts(Checkpoint.open(folder).spec.vocab)
    params = [replace(GREEDY, max_tokens=40 - 5 * number) for number in range(len(prompts))]  # the batch shrinks
    captured = answers(folder, prompts, params)
    monkeypatch.setenv("SPILLWAY_GRAPHS", "off")
    eager = answers(folder, prompts, params)
    assert eager.stats.graphs is None
    assert captured.tokens == eager.tokens
    assert captured.stats.graphs is not None
    assert set(captured.stats.graphs.captured) >= {2, 4, 8}
    assert captured.stats.graphs.replays > 20


def decode_step(decoder: Decoder, rows: int) -> tuple[Any, torch.Tensor]:
    """A step of ``rows`` decodes, the n-th behind 5 + 3n tokens, on a CPU, and a pool that holds their keys."""
    runs = [Run([3 + n] * (6 + 3 * n), 1, [4 * n + k for k in range(4)], computed=5 + 3 * n) for n in range(rows)]
    pool = torch.randn(make_pool(decoder, 4 * rows + 1).shape, generator=torch.Generator().manual_seed(1))
    return make_batch(runs, []), pool.to(DEVICE)


@only_cuda
def test_idle_rows_of_a_graph_leave_the_pool_alone(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("llama"))
    decoder = Decoder.load(checkpoint, LoadOptions(torch.device(DEVICE), torch.float32))
    batch, pool = decode_step(decoder, rows=3)
    eager_pool = pool.clone()
    wanted = decoder.forward(batch.to(pool.device), eager_pool).clone()
    graphs = DecodeGraphs(decoder, pool, max_sequences=4, context_tokens=64)
    for _ in range(CAPTURE_AT_USE - 1):
        assert graphs.run(batch) is None
    got = graphs.run(batch)
    assert got is not None
    assert got.shape == wanted.shape
    assert graphs.stats().captured == (4,)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool, eager_pool, rtol=1e-4, atol=1e-4)
    written = torch.zeros(pool.shape[0] * pool.shape[4], dtype=torch.bool)
    written[batch.slots] = True
    slots = pool.permute(0, 4, 1, 2, 3, 5).flatten(0, 1)
    assert torch.equal(slots[~written], eager_pool.permute(0, 4, 1, 2, 3, 5).flatten(0, 1)[~written])


@only_cuda
def test_a_step_that_cannot_be_captured_runs_without(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    prompts = [[5, 9, 200], [17]]
    wanted = greedy(folder, prompts)
    embed = Decoder._embed

    def waits(self: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
        int(token_ids[0])  # the host may not wait for the device under capture
        return embed(self, token_ids)

    monkeypatch.setattr(Decoder, "_embed", waits)
    got = greedy(folder, prompts)
    assert got.tokens == wanted.tokens
    assert got.stats.graphs is not None
    assert got.stats.graphs.failure is not None
    assert got.stats.graphs.replays == 0


@only_cuda
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_narrow_dtypes_give_nearly_the_same_logits(
    tiny_checkpoint: Callable[..., Path], family: str, dtype: torch.dtype, bound: float
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    prompt = mixed_prompts(checkpoint.spec.vocab)[4]
    blocks = list(range(-(-len(prompt) // 4)))

    def logits(device: str, dtype: torch.dtype) -> torch.Tensor:
        decoder = Decoder.load(checkpoint, LoadOptions(torch.device(device), dtype))
        pool = make_pool(decoder, len(blocks), dtype).to(device)
        chunk = Chunk(Run(prompt, len(prompt), blocks), 0, len(prompt))
        return decoder.forward(make_batch([], [chunk]).to(pool.device), pool).double().cpu()

    wanted, got = logits("cpu", torch.float32), logits("cuda", dtype)
    assert float((got - wanted).norm() / wanted.norm()) < bound
