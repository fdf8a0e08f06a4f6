"""The step plan: everything a rank needs to carry out one step, and nothing it would have to decide.

Plans are pure data. Every rank of a shard group gets the same plan, so ranks cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from spillway.kvstore import BlockHash


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one sequence to run in this step. Its KV goes to positions ``start …`` of the block table."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sample: bool
    """Whether the last token's logits are wanted: not in the middle of a prompt."""


@dataclass(slots=True)
class StepPlan:
    """One step: spills, then fetches, then copies, then the model over ``decodes`` and ``prefills``.

    The order matters: a block spilled here may be overwritten by a fetch, a copy or the model in the same step.
    """

    spills: list[tuple[int, BlockHash]] = field(default_factory=list)
    fetches: list[tuple[BlockHash, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    decodes: list[Work] = field(default_factory=list)
    prefills: list[Work] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do at all."""
        return not (self.spills or self.fetches or self.copies or self.decodes or self.prefills)

    @property
    def num_tokens(self) -> int:
        """Tokens the model runs over in this step."""
        return len(self.decodes) + sum(len(work.tokens) for work in self.prefills)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a rank could not know beforehand: which fetches were answered, and the logits ``[rows, vocab]`` in fp32."""

    fetched: list[bool]
    logits: Tensor | None
