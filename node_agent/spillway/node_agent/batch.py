"""One step's input for one rank, as tensors: what the scheduler decided, flattened for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The rows of one step. Decode rows come first, then the rows of every prefill chunk, sequence after sequence.

    T rows in all, of which the first `num_decode` are single-token queries and the rest belong to P prefill chunks.
    A KV length counts the row's or chunk's own tokens. Block tables may be wider than needed; what lies past the
    last used column is never read. With no decode rows (or no chunks) the matching tensors have zero rows, and
    `prefill_query_starts` is `[0]`.
    """

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64, the position of the token in its sequence."""
    slots: torch.Tensor
    """[T] int64, where the row's KV is written: block · block_tokens + offset; negative means: write nothing."""
    num_decode: int
    """How many of the first rows are decode queries."""
    decode_block_tables: torch.Tensor
    """[num_decode, maxb] int32."""
    decode_context_lens: torch.Tensor
    """[num_decode] int32, KV length including the row itself."""
    prefill_query_starts: torch.Tensor
    """[P + 1] int32, where each chunk starts, counted from the first prefill row; the last entry is T - num_decode."""
    prefill_block_tables: torch.Tensor
    """[P, maxb] int32."""
    prefill_context_lens: torch.Tensor
    """[P] int32, KV length including the chunk."""
    sample_rows: torch.Tensor
    """[R] int64, the rows whose logits are wanted."""

    @property
    def num_rows(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])

    @property
    def num_prefills(self) -> int:
        """P."""
        return int(self.prefill_context_lens.shape[0])

    def to(self, device: torch.device) -> StepBatch:
        """The same step with every tensor on `device` (no copy for those already there)."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if field.name != "num_decode"
        }
        return replace(self, **moved)
