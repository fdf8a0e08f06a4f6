"""The smallest engine that can drive a decoder: chunked prefill and batched greedy decode on a shuffled pool."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spillway.node_agent.batch import StepBatch
from spillway.node_agent.models.decoder import Decoder

BLOCK_TOKENS = 4


@dataclass
class Run:
    """One sequence: its tokens, how many of them have KV, and the logits after each position that was sampled."""

    tokens: list[int]
    prompt_length: int
    blocks: list[int]
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True)
class Chunk:
    """Rows ``start … stop`` of one run."""

    run: Run
    start: int
    stop: int


def make_pool(decoder: Decoder, blocks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A pool of NaN: what was never written must never be read."""
    spec = decoder.spec
    return torch.full((blocks, spec.layers, 2, decoder.kv_heads, BLOCK_TOKENS, spec.head_dim), torch.nan, dtype=dtype)


def make_batch(decodes: list[Run], chunks: list[Chunk]) -> StepBatch:
    """One step: a single-token query for each decode, then the chunks; the last row of each prompt is sampled."""
    rows = [(run, run.computed) for run in decodes]
    sample_rows = list(range(len(decodes)))
    starts = [0]
    for chunk in chunks:
        rows += [(chunk.run, position) for position in range(chunk.start, chunk.stop)]
        starts.append(len(rows) - len(decodes))
        if chunk.stop == len(chunk.run.tokens):
            sample_rows.append(len(rows) - 1)
    return StepBatch(
        token_ids=_longs([run.tokens[position] for run, position in rows]),
        positions=_longs([position for _, position in rows]),
        slots=_longs([run.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for run, p in rows]),
        num_decode=len(decodes),
        decode_block_tables=_tables([run.blocks for run in decodes]),
        decode_context_lens=_longs([run.computed + 1 for run in decodes]).int(),
        prefill_query_starts=_longs(starts).int(),
        prefill_block_tables=_tables([chunk.run.blocks for chunk in chunks]),
        prefill_context_lens=_longs([chunk.stop for chunk in chunks]).int(),
        sample_rows=_longs(sample_rows),
    )


def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    *,
    new_tokens: int,
    chunk_tokens: int = 1000,
    dtype: torch.dtype = torch.float32,
) -> list[Run]:
    """Greedy continuation of all prompts together; at most `chunk_tokens` prompt tokens a step, decodes beside them."""
    order = random.Random(len(prompts))
    needed = [-(-(len(prompt) + new_tokens) // BLOCK_TOKENS) for prompt in prompts]
    free = order.sample(range(sum(needed) + 3), sum(needed))
    runs = [Run(list(p), len(p), [free.pop() for _ in range(n)]) for p, n in zip(prompts, needed, strict=True)]
    pool = make_pool(decoder, sum(needed) + 3, dtype)
    while True:
        decodes = [run for run in runs if run.prompt_length <= run.computed and len(run.generated) < new_tokens]
        chunks, left = [], chunk_tokens
        for run in runs:
            if run.computed < run.prompt_length and left:
                stop = min(run.prompt_length, run.computed + left)
                chunks.append(Chunk(run, run.computed, stop))
                left -= stop - run.computed
        if not decodes and not chunks:
            return runs
        logits = decoder.forward(make_batch(decodes, chunks), pool)
        sampled = decodes + [chunk.run for chunk in chunks if chunk.stop == chunk.run.prompt_length]
        for run in decodes:
            run.computed += 1
        for chunk in chunks:
            chunk.run.computed = chunk.stop
        for run, row in zip(sampled, logits, strict=True):
            run.logits.append(row.clone())
            run.tokens.append(int(row.argmax()))


def _longs(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _tables(tables: list[list[int]]) -> Tensor:
    width = max((len(table) for table in tables), default=0)
    rows = [table + [2**31 - 1] * (width - len(table)) for table in tables]  # a read past the end must be noticed
    return torch.tensor(rows, dtype=torch.int32).reshape(len(tables), width)
