"""From logits to tokens. Each row depends on its own logits, parameters, seed and position, and on nothing else.

Randomness is counter-based (Philox keyed by seed and choice, counted by position), so a token does not depend on which
step or batch it was drawn in. Filters apply in the usual order: penalties and biases, temperature, top-k, top-p, min-p.

On a CPU rows are drawn one by one; on a GPU, where each question would wait for the device, all in one launch. Both
follow the same distribution, but lay tokens out in another order: one seed gives other tokens on the other device.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spillway.kernels import on_triton
from spillway.node_agent.request import SamplingParams, Sequence, TokenLogprob

CANDIDATES = 256
"""Top-p looks at this many most likely tokens first; only rows whose nucleus is wider are sorted in full."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token, or None where the logits were not numbers; with log-probabilities if asked for."""

    token: int | None
    logprob: TokenLogprob | None = None


class Sampler:
    """Chooses tokens; ``eos_ids`` are what ``min_tokens`` keeps from being chosen."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
        """One token for each row of ``logits [R, vocab]`` fp32 and its sequence."""
        best_values, best = logits.max(dim=-1)
        found = torch.where(torch.isfinite(best_values), best, -1).tolist()
        tokens: list[int | None] = [token if token >= 0 else None for token in found]
        open_rows = [row for row, each in enumerate(sequences) if tokens[row] is not None and not _is_best(each)]
        if on_triton(logits) and open_rows:
            tokens_of = self._draw_together(logits, open_rows, sequences)
        else:
            tokens_of = [self._draw_alone(logits[row], sequences[row]) for row in open_rows]
        for row, token in zip(open_rows, tokens_of, strict=True):
            tokens[row] = token
        return [
            Sampled(token, self._logprob(logits[row], token, sequence))
            for row, (token, sequence) in enumerate(zip(tokens, sequences, strict=True))
        ]

    def _draw_alone(self, row: Tensor, sequence: Sequence) -> int:
        params = sequence.request.params
        edited = self._edit(row, sequence) if params.edits_logits else row
        return int(edited.argmax()) if params.greedy else draw(edited, params, _uniform(sequence))

    def _draw_together(self, logits: Tensor, rows: list[int], sequences: list[Sequence]) -> list[int | None]:
        """A token for each of `rows` by the Triton kernel: the host waits once."""
        from spillway.kernels.ops import SampleSettings, sample  # Triton is not needed on a CPU

        drawn = [sequences[row] for row in rows]
        edited = logits[rows]
        for place, sequence in enumerate(drawn):
            if sequence.request.params.edits_logits:
                edited[place] = self._edit(edited[place], sequence)

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=logits.device)

        params = [sequence.request.params for sequence in drawn]
        most = [min(max(each.top_k, 0), logits.shape[1]) for each in params]
        settings = SampleSettings(
            temperature=floats([each.temperature for each in params]),
            top_k=torch.tensor(most, dtype=torch.int32, device=logits.device),
            top_p=floats([each.top_p for each in params]),
            min_p=floats([each.min_p for each in params]),
            uniform=floats([_uniform(sequence) for sequence in drawn]),
        )
        return [token if token >= 0 else None for token in sample(edited, settings).tolist()]

    def _logprob(self, logits: Tensor, token: int | None, sequence: Sequence) -> TokenLogprob | None:
        count = sequence.request.params.logprobs
        return None if count is None or token is None else token_logprob(logits, token, count)

    def _edit(self, logits: Tensor, sequence: Sequence) -> Tensor:
        params, row = sequence.request.params, logits.clone()
        generated = sequence.generated
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if generated and (params.presence_penalty or params.frequency_penalty):
            counts = Counter(generated)
            ids = torch.tensor(list(counts), device=row.device)
            times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
            row[ids] -= params.presence_penalty + params.frequency_penalty * times
        for token, bias in params.logit_bias:
            row[token] += bias
        if len(generated) < params.min_tokens:
            row[sorted(self._eos_ids | set(params.stop_token_ids))] = -math.inf
        return row


def _is_best(sequence: Sequence) -> bool:
    """Whether the token is the most likely one, of logits as they are."""
    params = sequence.request.params
    return params.greedy and not params.edits_logits


def draw(logits: Tensor, params: SamplingParams, uniform: float) -> int:
    """A token from one row of logits by inverse transform of ``uniform`` in [0, 1)."""
    scaled = logits.double() / params.temperature
    weights = torch.exp(scaled - scaled.max())
    if params.top_k <= 0 and params.top_p >= 1.0:
        return _invert(_above_min_p(weights, params.min_p), uniform)
    vocab = weights.shape[0]
    limit = min(params.top_k, vocab) if params.top_k > 0 else vocab
    total = weights.sum() if limit == vocab else None
    kept, ids = weights.topk(min(limit, CANDIDATES))
    if params.top_p < 1.0 or limit > CANDIDATES:
        if limit > len(kept) and (total is None or kept.sum() < params.top_p * total):
            kept, ids = weights.topk(limit)
        mass = params.top_p * (total if total is not None else kept.sum())
        before = kept.cumsum(0) - kept
        wanted = int((before < mass).sum())
        kept, ids = kept[: max(wanted, 1)], ids[: max(wanted, 1)]
    return int(ids[_invert(_above_min_p(kept, params.min_p), uniform)])


def _above_min_p(weights: Tensor, min_p: float) -> Tensor:
    return torch.where(weights >= min_p * weights.max(), weights, 0.0) if min_p > 0 else weights


def _invert(weights: Tensor, uniform: float) -> int:
    cumulative = weights.cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(index, int(weights.nonzero()[-1]))


def _uniform(sequence: Sequence) -> float:
    key = np.array([sequence.request.params.seed & (2**64 - 1), sequence.choice], np.uint64)
    position = np.array([len(sequence.tokens), 0, 0, 0], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=position)).random())


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Log-probability of ``token`` under one row of raw logits, with the ``count`` most likely tokens."""
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = logprobs.topk(min(count, logits.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
