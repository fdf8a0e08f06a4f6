#!/usr/bin/env python3
"""Decode steps of whole models on a GPU, launched kernel by kernel and as CUDA graphs.

    python benchmarks/kernels/step_gpu.py [--out FILE]

Weights are random, of the shapes of SmolLM2 135M and Llama 3.1 8B, in bfloat16; every sequence has 1024 tokens behind
it. The rate is of the bytes that a step cannot but read, weights once and each sequence's keys and values, against the
copy bandwidth of the same run. A step begins with its input on the host and ends with logits on the device.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_ground import RESULTS, Record, Report, start
from gpu_peers import freed
from torch import Tensor

from spillway.kernels.tuning.timing import event_ms
from spillway.node_agent.batch import StepBatch
from spillway.node_agent.graphs import CAPTURE_AT_USE, DecodeGraphs
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.models.linear import DenseLinear, GatedLinear
from spillway.node_agent.models.rope import RotaryPositions
from spillway.node_agent.models.spec import DecoderSpec
from spillway.node_agent.models.weights import DecoderWeights, LayerWeights, LoadOptions
from spillway.node_agent.plan import StepPlan, Work
from spillway.node_agent.rank import build_batch

Call = Callable[[], object]
BF16, DEVICE = torch.bfloat16, torch.device("cuda", 0)
BLOCK_TOKENS, CONTEXT = 16, 1024
ROWS = (1, 8, 32, 64, 128, 256)


@dataclass(frozen=True)
class Size:
    """A model's shape by name."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def spec(self) -> DecoderSpec:
        """As the decoder wants it."""
        half = self.head_dim // 2
        return DecoderSpec(
            model_type="llama",
            layers=self.layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab=self.vocab,
            norm_eps=1e-5,
            positions=RotaryPositions(tuple(10000.0 ** (-i / half) for i in range(half))),
            max_positions=8192,
            windows=(None,) * self.layers,
            tied_embeddings=self.tied,
        )


SIZES = (
    Size("135M", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    Size("8B", 32, 4096, 14336, 32, 8, 128, 128256, tied=False),
)


def run(report: Report) -> None:
    """All sizes, all numbers of rows."""
    for size in SIZES:
        with freed():
            _model(report, size)


def _model(report: Report, size: Size) -> None:
    decoder, spec = random_decoder(size.spec), size.spec
    weight_bytes, token_bytes = spec.weight_count() * 2, spec.kv_bytes_per_token(2)
    if not size.tied:
        weight_bytes -= spec.vocab * spec.hidden * 2  # of the embedding only the rows of the step's tokens are read
    free_blocks = int(torch.cuda.mem_get_info()[0] * 0.8) // (token_bytes * BLOCK_TOKENS)
    per_row = CONTEXT // BLOCK_TOKENS
    rows_that_fit = [rows for rows in ROWS if rows * per_row <= free_blocks]
    pool = torch.empty(
        max(rows_that_fit) * per_row, spec.layers, 2, spec.kv_heads, BLOCK_TOKENS, spec.head_dim, dtype=BF16,
        device=DEVICE,
    ).normal_()  # fmt: skip
    graphs = DecodeGraphs(decoder, pool, max(ROWS), spec.max_positions)
    for rows in rows_that_fit:
        batch = decode_batch(rows, pool.shape[0])
        moved = weight_bytes + rows * CONTEXT * token_bytes
        case = f"{size.name}, {rows} rows behind {CONTEXT} tokens"
        wanted = decoder.forward(batch.to(DEVICE), pool).clone()
        timed_step(
            report, case, "spillway, kernel by kernel", moved, lambda b=batch: decoder.forward(b.to(DEVICE), pool)
        )
        for _ in range(CAPTURE_AT_USE):
            logits = graphs.run(batch)
        if logits is None:
            report.add(Record("step", case, "spillway, CUDA graph", None, note=str(graphs.stats().failure)))
            continue
        difference = float((logits.double() - wanted.double()).norm() / wanted.double().norm())
        timed_step(report, case, "spillway, CUDA graph", moved, lambda b=batch: graphs.run(b), difference)


def timed_step(report: Report, case: str, name: str, moved: int, call: Call, error: float | None = None) -> None:
    """Time one way to make a step; the error is the distance of a graph's logits from the other way's."""
    ms = event_ms(call)
    rate = moved / ms / 1e6
    report.add(Record("step", case, name, ms, rate, rate / report.ceilings.copy_gb_s, error))


def decode_batch(rows: int, blocks: int) -> StepBatch:
    """So many sequences in shuffled blocks, each at its last token, on the CPU."""
    per_row = CONTEXT // BLOCK_TOKENS
    ids = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))[: rows * per_row].view(rows, per_row)
    works = [Work([11 + n], CONTEXT - 1, ids[n].tolist(), sample=True) for n in range(rows)]
    return build_batch(StepPlan(decodes=works), BLOCK_TOKENS)


def random_decoder(spec: DecoderSpec) -> Decoder:
    """Random weights of about the size that training leaves."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=BF16, device=DEVICE).normal_(std=columns**-0.5)

    def norm() -> Tensor:
        return torch.ones(spec.hidden, dtype=BF16, device=DEVICE)

    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layers = [
        LayerWeights(
            input_norm=norm(),
            qkv=DenseLinear(matrix(q + 2 * kv, spec.hidden), None),
            q_norm=None,
            k_norm=None,
            o=DenseLinear(matrix(spec.hidden, q), None),
            post_norm=norm(),
            gated=GatedLinear(DenseLinear(matrix(2 * spec.intermediate, spec.hidden), None)),
            down=DenseLinear(matrix(spec.hidden, spec.intermediate), None),
        )
        for _ in range(spec.layers)
    ]
    embedding = matrix(spec.vocab, spec.hidden)
    head = embedding if spec.tied_embeddings else matrix(spec.vocab, spec.hidden)
    weights = DecoderWeights(embedding, layers, norm(), DenseLinear(head, None))
    return Decoder(spec, weights, LoadOptions(DEVICE, BF16))


def main() -> None:
    """Run and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "step-gpu.json")
    options = parser.parse_args()
    report = start()
    run(report)
    report.write(options.out)


if __name__ == "__main__":
    main()
