"""One rank: its slice of the model, its device pool, its store. It carries out step plans and decides nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from spillway import kernels
from spillway.kvstore import BlockHash, BlockStore
from spillway.node_agent.batch import StepBatch
from spillway.node_agent.block_moves import DirectMoves, StagedMoves
from spillway.node_agent.graphs import DecodeGraphs, GraphStats
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.plan import StepPlan, StepResult, Work


class Rank:
    """Runs plans on one device.

    ``pool`` is ``[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]``, C-contiguous: a block is one byte range,
    and a spill is one plain copy. On CUDA the bytes pass through staging buffers, and decode steps are graphs if
    ``graphs`` are given.
    """

    def __init__(
        self, decoder: Decoder, pool: torch.Tensor, store: BlockStore | None, graphs: DecodeGraphs | None = None
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._store = store
        self._graphs = graphs
        self._block_tokens = pool.shape[4]
        self._moves: DirectMoves | StagedMoves = DirectMoves(pool) if pool.device.type == "cpu" else StagedMoves(pool)

    def run(self, plan: StepPlan) -> StepResult:
        """Carry out one plan: spills, fetches, copies, then the model."""
        self.save(plan.spills)
        fetched = self._load(plan.fetches)
        if plan.copies:
            source, target = torch.tensor(plan.copies, device=self._pool.device).T.contiguous()
            kernels.copy_blocks(self._pool, source, target)
        if not plan.num_tokens:
            return StepResult(fetched, None)
        batch = build_batch(plan, self._block_tokens)
        logits = self._graphs.run(batch) if self._graphs is not None else None
        if logits is None:
            logits = self._decoder.forward(batch.to(self._pool.device), self._pool)
        return StepResult(fetched, logits)

    def save(self, spills: list[tuple[int, BlockHash]]) -> None:
        """Hand copies of blocks to the store. What the store drops is counted there and recomputed later."""
        if spills and self._store is not None:
            self._moves.save(spills, self._store)

    def _load(self, fetches: list[tuple[BlockHash, int]]) -> list[bool]:
        return self._moves.load(fetches, self._store) if fetches and self._store is not None else []

    def graph_stats(self) -> GraphStats | None:
        """What became of the graphs, where there are any."""
        return self._graphs.stats() if self._graphs is not None else None


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
