"""One rank: its slice of the model, its device pool, its store. It carries out step plans and decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from spillway import kernels
from spillway.kvstore import BlockHash, BlockStore
from spillway.node_agent.batch import StepBatch
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.plan import StepPlan, StepResult, Work

Move = TypeVar("Move")

STAGING_BYTES = 64 << 20
"""What a spill or a fetch on CUDA takes of pinned and of device memory, however many blocks it moves."""


class Rank:
    """Runs plans on one device.

    ``pool`` is ``[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]``, C-contiguous: a block is one byte range,
    and a spill is one plain copy. On CUDA the bytes pass through a pinned staging buffer.
    """

    def __init__(self, decoder: Decoder, pool: torch.Tensor, store: BlockStore | None) -> None:
        self._decoder = decoder
        self._pool = pool
        self._store = store
        self._block_tokens = pool.shape[4]
        raw = pool.view(torch.uint8).reshape(pool.shape[0], -1)
        self._device_bytes = raw
        self._host_bytes: npt.NDArray[np.uint8] | None = raw.numpy() if pool.device.type == "cpu" else None

    def run(self, plan: StepPlan) -> StepResult:
        """Carry out one plan: spills, fetches, copies, then the model."""
        self.save(plan.spills)
        fetched = self._load(plan.fetches)
        if plan.copies:
            source, target = torch.tensor(plan.copies, device=self._pool.device).T.contiguous()
            kernels.copy_blocks(self._pool, source, target)
        if not plan.num_tokens:
            return StepResult(fetched, None)
        batch = build_batch(plan, self._block_tokens).to(self._pool.device)
        return StepResult(fetched, self._decoder.forward(batch, self._pool))

    def save(self, spills: list[tuple[int, BlockHash]]) -> None:
        """Hand copies of blocks to the store. What the store drops is counted there and recomputed later."""
        if not spills or self._store is None:
            return
        if self._host_bytes is not None:
            self._store.put_many([(name, self._host_bytes[block]) for block, name in spills])
            return
        for part in self._parts(spills):
            blocks = torch.tensor([block for block, _ in part], device=self._device_bytes.device)
            rows = self._stage(len(part)).copy_(self._device_bytes[blocks]).numpy()
            self._store.put_many([(name, row) for (_, name), row in zip(part, rows, strict=True)])

    def _load(self, fetches: list[tuple[BlockHash, int]]) -> list[bool]:
        if not fetches or self._store is None:
            return []
        if self._host_bytes is not None:
            return self._store.get_many([(name, self._host_bytes[block]) for name, block in fetches])
        answers = []
        for part in self._parts(fetches):
            staged = self._stage(len(part))
            answers += self._store.get_many([(name, row) for (name, _), row in zip(part, staged.numpy(), strict=True)])
            blocks = torch.tensor([block for _, block in part], device=self._device_bytes.device)
            self._device_bytes[blocks] = staged.to(self._device_bytes.device)
        return answers

    def _parts(self, moves: list[Move]) -> Iterator[list[Move]]:
        """As many at a time as the staging buffers may take."""
        count = max(1, STAGING_BYTES // self._device_bytes.shape[1])
        return (moves[start : start + count] for start in range(0, len(moves), count))

    def _stage(self, blocks: int) -> torch.Tensor:
        return torch.empty((blocks, self._device_bytes.shape[1]), dtype=torch.uint8, pin_memory=True)


def build_batch(plan: StepPlan, block_tokens: int) -> StepBatch:
    """Flatten a plan into the tensors of a ``StepBatch`` on the CPU."""
    works = [*plan.decodes, *plan.prefills]
    lengths = np.fromiter((len(work.tokens) for work in works), np.int64, len(works))
    starts = np.fromiter((work.start for work in works), np.int64, len(works))
    tokens = np.concatenate([np.asarray(work.tokens, np.int64) for work in works])
    row_starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(tokens)) - np.repeat(row_starts[:-1] - starts, lengths)
    tables = _tables(works)
    owner = np.repeat(np.arange(len(works)), lengths)
    slots = tables[owner, positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens
    context = (starts + lengths).astype(np.int32)
    decodes = len(plan.decodes)
    sampled = row_starts[1:][np.fromiter((work.sample for work in works), np.bool_, len(works))] - 1
    return StepBatch(
        token_ids=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        num_decode=decodes,
        decode_block_tables=torch.from_numpy(tables[:decodes]),
        decode_context_lens=torch.from_numpy(context[:decodes]),
        prefill_query_starts=torch.from_numpy((row_starts[decodes:] - decodes).astype(np.int32)),
        prefill_block_tables=torch.from_numpy(tables[decodes:]),
        prefill_context_lens=torch.from_numpy(context[decodes:]),
        sample_rows=torch.from_numpy(sampled),
    )


def _tables(works: list[Work]) -> npt.NDArray[np.int32]:
    """Block tables of all works, padded to the widest."""
    tables = np.zeros((len(works), max(len(work.blocks) for work in works)), np.int32)
    for row, work in zip(tables, works, strict=True):
        row[: len(work.blocks)] = work.blocks
    return tables
