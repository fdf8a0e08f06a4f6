"""Attention problems for any implementation: drawn settings, a pool in which whatever must not be read is poison.

Slots of a block behind the context are NaN, tables name no block behind it, and blocks that no query sees have an id
that leads out of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from spillway.kernels import AttentionParams
from spillway.kernels.reference import attention as reference

NO_BLOCK = 2**31 - 1

# |got - wanted| / |wanted| in the Frobenius norm, by dtype of the queries
BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Setting:
    """What one model and layer fix."""

    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_tokens: int = 16
    dtype: torch.dtype = torch.float32
    features: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def params(self) -> AttentionParams:
        """The layer's settings; slopes are drawn where asked for."""
        features = dict(self.features)
        if features.pop("alibi", False):
            features["alibi_slopes"] = torch.rand(self.query_heads, generator=self.generator(1)) * 0.2
        return AttentionParams(scale=self.head_dim**-0.5, **features)

    def generator(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1000 + salt)


@dataclass(frozen=True)
class Problem:
    """Sequences with their cached keys and values and the queries of their last tokens."""

    setting: Setting
    q: Tensor
    pool: Tensor
    layer: int
    tables: Tensor
    starts: Tensor
    contexts: Tensor

    @property
    def last_rows(self) -> Tensor:
        """The row of each sequence's last token."""
        return self.starts[1:].long() - 1

    def prefill(self, ops: Any, **where: Tensor) -> Tensor:
        """Run flash_prefill of an implementation."""
        rest = (self.tables, self.starts, self.contexts, self.setting.params())
        return ops.flash_prefill(self.q, self.pool, self.layer, *rest, **where)

    def decode(self, ops: Any, **where: Tensor) -> Tensor:
        """Run paged_decode of an implementation on every sequence's last token."""
        q = self.q[self.last_rows]
        return ops.paged_decode(q, self.pool, self.layer, self.tables, self.contexts, self.setting.params(), **where)

    def wanted(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of all rows in float64, without the poison."""
        tables = self.tables.masked_fill(self.tables == NO_BLOCK, 0)
        rest = (tables, self.starts, self.contexts, self.setting.params())
        pool = self.pool if self.pool.element_size() == 1 else self.pool.nan_to_num()
        return reference.flash_prefill(self.q, pool, self.layer, *rest)

    def only(self, sequences: list[int]) -> Problem:
        """The same problem with some of its sequences, in that order."""
        pieces = [self.q[int(self.starts[s]) : int(self.starts[s + 1])] for s in sequences]
        lengths = torch.tensor([len(piece) for piece in pieces])
        starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        return replace(
            self, q=torch.cat(pieces), starts=starts, tables=self.tables[sequences], contexts=self.contexts[sequences]
        )


def make(setting: Setting, lengths: list[tuple[int, int]], layers: int = 2) -> Problem:
    """A problem with sequences of (context, chunk) tokens, blocks in random order."""
    bt, generator = setting.block_tokens, setting.generator(2)
    counts = [-(-context // bt) for context, _ in lengths]
    pool = torch.randn(sum(counts) + 2, layers, 2, setting.kv_heads, bt, setting.head_dim, generator=generator)
    pool = pool.to(setting.dtype)
    free = torch.randperm(len(pool), generator=generator).tolist()
    tables = torch.full((len(lengths), max(counts) + 2), NO_BLOCK, dtype=torch.int32)
    for sequence, (context, chunk) in enumerate(lengths):
        for n in range(counts[sequence]):
            block = free.pop()
            first, last = n * bt, min((n + 1) * bt, context)
            if _is_seen(setting, first, last, context, chunk):
                tables[sequence, n] = block
                pool[block, :, :, :, last - first :] = torch.nan
    q = torch.randn(sum(chunk for _, chunk in lengths), setting.query_heads, setting.head_dim, generator=generator)
    starts = torch.tensor([0, *torch.tensor([chunk for _, chunk in lengths]).cumsum(0).tolist()], dtype=torch.int32)
    contexts = torch.tensor([context for context, _ in lengths], dtype=torch.int32)
    return Problem(setting, q.to(setting.dtype), pool, layers - 1, tables, starts, contexts)


def _is_seen(setting: Setting, first: int, last: int, context: int, chunk: int) -> bool:
    """Whether a query of the chunk sees a key in [first, last); small blocks share a panel and all need an id."""
    window = setting.features.get("window")
    if window is None or setting.block_tokens < 16:
        return True
    return last > context - chunk + 1 - window or first < setting.features.get("sinks", 0)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|; NaN if got has one."""
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Within the dtype's bound, every element written."""
    assert not got.isnan().any(), "an element was never written, or poison was read"
    assert relative_error(got, wanted) <= BOUNDS[dtype]


def assert_lse_near(got: Tensor, wanted: Tensor) -> None:
    """Absolutely near, since a shift of one scales all weights; -inf where nothing is seen."""
    assert torch.equal(got == -torch.inf, wanted == -torch.inf)
    seen = wanted > -torch.inf
    assert ((got.double() - wanted)[seen].abs() <= 2e-5).all()


HEADS = [(1, 1), (4, 4), (4, 2), (8, 1), (9, 3), (14, 2)]
FEATURES: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"window": 1},
    {"window": 37},
    {"window": 200, "sinks": 4},
    {"window": 30, "sinks": 150},
    {"soft_cap": 2.5},
    {"alibi": True},
    {"window": 60, "sinks": 20, "soft_cap": 5.0, "alibi": True},
]


@st.composite
def settings_of(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Setting:
    """Any setting an implementation must take."""
    query_heads, kv_heads = draw(st.sampled_from(HEADS))
    return Setting(
        query_heads,
        kv_heads,
        draw(st.sampled_from([64, 80, 96, 128, 256])),
        draw(st.sampled_from([16, 32, 64])),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(FEATURES)),
        draw(st.integers(0, 2**20)),
    )


@st.composite
def chunks(draw: st.DrawFn, longest: int = 700) -> list[tuple[int, int]]:
    """(context, chunk) of a few sequences: single tokens, whole prompts, chunks behind a cached context."""
    sequences = draw(st.integers(1, 4))
    lengths = []
    for _ in range(sequences):
        context = draw(st.one_of(st.integers(1, 40), st.integers(1, longest)))
        chunk = draw(st.one_of(st.just(1), st.integers(1, min(context, 150))))
        lengths.append((context, chunk))
    return lengths
