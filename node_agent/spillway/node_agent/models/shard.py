"""Which part of each weight a tensor rank holds (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from spillway.node_agent.models.errors import ShardError
from spillway.node_agent.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Rank ``rank`` of ``size``. Query heads, MLP columns and vocabulary are split; KV heads too, or repeated if fewer.

    Attention output and MLP-down are split along their inputs, so each rank has a partial sum; the vocabulary's split
    may be uneven.
    """

    rank: int = 0
    size: int = 1

    def check(self, spec: DecoderSpec) -> None:
        """Whether `spec` can be split this way.

        Raises:
            ShardError: a rank out of range, or sizes that do not divide.
        """
        if not 0 <= self.rank < self.size:
            raise ShardError(f"tensor rank {self.rank} is not in 0..{self.size - 1}")
        if spec.heads % self.size or spec.intermediate % self.size:
            raise ShardError(
                f"{spec.heads} heads and an MLP of {spec.intermediate} columns do not divide by {self.size} ranks"
            )
        if spec.kv_heads % self.size and self.size % spec.kv_heads:
            raise ShardError(f"{spec.kv_heads} KV heads neither divide by {self.size} ranks nor the other way round")

    def heads(self, spec: DecoderSpec) -> int:
        """Query heads of this rank."""
        return spec.heads // self.size

    def kv_heads(self, spec: DecoderSpec) -> int:
        """KV heads of this rank."""
        return max(1, spec.kv_heads // self.size)

    def q_rows(self, spec: DecoderSpec) -> slice:
        """Rows of the q projection, which are the columns of the output projection."""
        width = self.heads(spec) * spec.head_dim
        return slice(self.rank * width, (self.rank + 1) * width)

    def kv_rows(self, spec: DecoderSpec) -> slice:
        """Rows of the k and v projections."""
        first = self.rank * spec.kv_heads // self.size
        return slice(first * spec.head_dim, (first + self.kv_heads(spec)) * spec.head_dim)

    def mlp_rows(self, spec: DecoderSpec) -> slice:
        """Rows of the gate and up projections, which are the columns of the down projection."""
        width = spec.intermediate // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def vocab_rows(self, spec: DecoderSpec) -> slice:
        """Rows of the embedding and of the output head."""
        return slice(self.rank * spec.vocab // self.size, (self.rank + 1) * spec.vocab // self.size)


WHOLE = TensorShard()
"""All of the model on one rank."""
