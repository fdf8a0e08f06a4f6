"""Decode steps as CUDA graphs: a whole step in one launch, where its some hundred kernels would wait for the host.

A graph fixes shapes and addresses. So there is one for each bucket of rows (1, 2, 4, …), made when the bucket has been
wanted a few times, and it reads its inputs from buffers that stay where they are. Rows beyond a step's own are idle:
they have no slot, so they write nothing, and no key, so they read nothing. Steps with a prefill, and steps of more rows
than the largest bucket, run as they always did.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spillway.node_agent.batch import StepBatch
from spillway.node_agent.models.decoder import Decoder

log = logging.getLogger(__name__)

MAX_ROWS = 256
"""Of the largest bucket: with more rows than that the kernels, not their launches, take the time."""
CAPTURE_AT_USE = 4
"""A bucket is captured when it is wanted for the fourth time: capturing costs as much as a few steps."""
NO_SLOT = -1


def graphs_wanted() -> bool:
    """Whether decode steps on CUDA should become graphs: unless the environment has ``SPILLWAY_GRAPHS=off``."""
    return os.environ.get("SPILLWAY_GRAPHS") != "off"


def bucket_of(rows: int) -> int:
    """The smallest power of two that is at least ``rows``."""
    return 1 << (rows - 1).bit_length()


class StepInputs:
    """A decode step's input at fixed addresses, for up to ``rows`` rows (a power of two) and ``width`` blocks a row."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows = rows
        self.width = width
        self._token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._slots = torch.full((rows,), NO_SLOT, dtype=torch.int64, device=device)
        self._context_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros((rows, width), dtype=torch.int32, device=device)
        self._every_row = torch.arange(rows, device=device)
        self._no_starts = torch.zeros(1, dtype=torch.int32, device=device)

    def take(self, batch: StepBatch) -> bool:
        """Whether the step is one of decode rows alone, each sampled, that fits: only such a step can be a graph."""
        rows, width = batch.decode_block_tables.shape
        return 0 < rows == batch.num_rows == batch.sample_rows.shape[0] and rows <= self.rows and width <= self.width

    def fill(self, batch: StepBatch) -> int:
        """Copy a step (on the CPU) that `take` said yes to into the buffers, idle rows behind it; its bucket."""
        rows, width = batch.decode_block_tables.shape
        bucket = bucket_of(rows)
        for buffer, values, idle in (
            (self._token_ids, batch.token_ids, 0),
            (self._positions, batch.positions, 0),
            (self._slots, batch.slots, NO_SLOT),
            (self._context_lens, batch.decode_context_lens, 0),
        ):
            buffer[:bucket].copy_(functional.pad(values, (0, bucket - rows), value=idle), non_blocking=True)
        # What older steps left in the tables lies behind a row's context, where nothing is read.
        self._tables[:rows, :width].copy_(batch.decode_block_tables, non_blocking=True)
        return bucket

    def batch(self, bucket: int) -> StepBatch:
        """The first ``bucket`` rows of the buffers as a step."""
        return StepBatch(
            token_ids=self._token_ids[:bucket],
            positions=self._positions[:bucket],
            slots=self._slots[:bucket],
            num_decode=bucket,
            decode_block_tables=self._tables[:bucket],
            decode_context_lens=self._context_lens[:bucket],
            prefill_query_starts=self._no_starts,
            prefill_block_tables=self._tables[:0],
            prefill_context_lens=self._context_lens[:0],
            sample_rows=self._every_row[:bucket],
        )


@dataclass(frozen=True, slots=True)
class GraphStats:
    """What became of the graphs: buckets captured, steps that were a replay, and why no more are made, if so."""

    captured: tuple[int, ...]
    replays: int
    failure: str | None


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    """``[bucket, vocab]`` float32, overwritten by every replay."""


class DecodeGraphs:
    """The graphs of one decoder on one pool. The pool's memory must stay where it is."""

    def __init__(self, decoder: Decoder, pool: Tensor, max_sequences: int, context_tokens: int) -> None:
        rows = bucket_of(min(max_sequences, MAX_ROWS))
        # Graphs write to scratch memory of their own: that of other steps may have to grow, and would move.
        self._decoder = decoder.with_scratch(rows)
        self._pool = pool
        self._inputs = StepInputs(rows, -(-context_tokens // pool.shape[4]), pool.device)
        self._uses: Counter[int] = Counter()
        self._captured: dict[int, _Captured] = {}
        self._stream = torch.cuda.Stream(pool.device)
        self._memory = torch.cuda.graph_pool_handle()
        self._replays = 0
        self._failure: str | None = None
        self._broken: torch.cuda.CUDAGraph | None = None

    def run(self, batch: StepBatch) -> Tensor | None:
        """The logits of a step (on the CPU), as of `Decoder.forward`; None where it must run without a graph."""
        if self._failure is not None or not self._inputs.take(batch):
            return None
        bucket = bucket_of(batch.num_rows)
        self._uses[bucket] += 1
        if self._uses[bucket] < CAPTURE_AT_USE:
            return None
        self._inputs.fill(batch)
        if bucket not in self._captured and not self._capture(bucket):
            return None
        self._captured[bucket].graph.replay()
        self._replays += 1
        return self._captured[bucket].logits[: batch.num_rows]

    def stats(self) -> GraphStats:
        """A snapshot."""
        return GraphStats(tuple(sorted(self._captured)), self._replays, self._failure)

    def _capture(self, bucket: int) -> bool:
        """Make the graph of a bucket; False, with the reason kept and told, if this GPU or its memory will not have it.

        The step in the buffers is run once before: that compiles kernels, allocates scratch memory and makes the
        libraries' workspaces, none of which may happen under capture. It writes the KV that the replay writes again.
        """
        batch, graph = self._inputs.batch(bucket), torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        try:
            with torch.cuda.stream(self._stream):  # restores the current stream, also where a capture breaks off
                self._decoder.forward(batch, self._pool)
                # Other threads may use the device meanwhile: only what this one does must be capturable.
                with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                    logits = self._decoder.forward(batch, self._pool)
        except RuntimeError as error:
            self._failure = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            log.warning("decode steps go on without CUDA graphs: %s", self._failure)
            self._captured.clear()
            self._let_go_of(graph)
            return False
        finally:
            torch.cuda.current_stream(self._pool.device).wait_stream(self._stream)
        self._captured[bucket] = _Captured(graph, logits)
        return True

    def _let_go_of(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a capture that broke off, have the allocator treat memory as before it.

        `torch.cuda.graph` leaves it directed to the graph's memory, by a function that lives in the graph.
        """
        self._broken = graph
        with contextlib.suppress(RuntimeError):  # it had not begun, or has ended well
            torch._C._cuda_endAllocateToPool(self._pool.device.index, self._memory)
