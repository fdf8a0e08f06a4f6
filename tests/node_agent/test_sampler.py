"""Tokens are drawn from exactly the distribution that the parameters ask for, and only from the row's own logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spillway.node_agent.request import Request, SamplingParams, Sequence
from spillway.node_agent.sampler import Sampler, draw, token_logprob

EOS = 3


def allowed(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The filtered distribution, the slow way: sort, cut, renormalise."""
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    keep = order[: params.top_k] if params.top_k > 0 else order
    if params.top_p < 1.0:
        mass = np.cumsum(weights[keep]) / weights[keep].sum()
        keep = keep[: int(np.searchsorted(mass, params.top_p)) + 1]
    keep = keep[weights[keep] >= params.min_p * weights.max()]
    result = np.zeros_like(weights)
    result[keep] = weights[keep] / weights[keep].sum()
    return result


@st.composite
def sampling(draw_: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=9,
        temperature=draw_(st.sampled_from([0.3, 1.0, 1.7])),
        top_k=draw_(st.sampled_from([0, 1, 5, 300, 10_000])),
        top_p=draw_(st.sampled_from([1.0, 0.95, 0.5, 0.01])),
        min_p=draw_(st.sampled_from([0.0, 0.05, 0.5])),
    )


@settings(max_examples=40, deadline=None)
@given(params=sampling(), seed=st.integers(0, 10_000), vocab=st.sampled_from([7, 300, 1500]))
def test_draws_follow_the_filtered_distribution(params: SamplingParams, seed: int, vocab: int) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3
    expected = allowed(logits.numpy(), params)
    grid = (np.arange(100) + 0.5) / 100
    drawn = np.bincount([draw(logits, params, float(uniform)) for uniform in grid], minlength=vocab) / len(grid)
    assert not drawn[expected == 0].any(), "a token that was filtered out"
    assert np.abs(drawn - expected).max() <= 1 / len(grid) + 1e-6


def sequence(params: SamplingParams, tokens: list[int] | None = None, choice: int = 0) -> Sequence:
    prompt = (5, 6)
    return Sequence(Request(0, prompt, params, 0), choice, [*prompt, *(tokens or [])])


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(1))
    sequences = [sequence(SamplingParams(9, temperature=1.0, top_p=0.9, seed=seed)) for seed in range(8)]
    sampler = Sampler(frozenset([EOS]))
    together = [each.token for each in sampler.sample(logits, sequences)]
    alone = [sampler.sample(logits[[row]], [each])[0].token for row, each in enumerate(sequences)]
    assert together == alone


def test_seed_choice_and_position_each_give_another_draw() -> None:
    logits = torch.zeros(1, 5000)
    sampler = Sampler(frozenset([EOS]))

    def token(seed: int, choice: int, tokens: list[int]) -> int | None:
        params = SamplingParams(9, temperature=1.0, seed=seed)
        return sampler.sample(logits, [sequence(params, tokens, choice)])[0].token

    base = token(1, 0, [])
    assert base == token(1, 0, [])
    assert len({base, token(2, 0, []), token(1, 1, []), token(1, 0, [9]), token(-1, 0, [])}) == 5


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_no_temperature_means_the_most_likely_token(temperature: float) -> None:
    logits = torch.randn(1, 900, generator=torch.Generator().manual_seed(3))
    (sampled,) = Sampler(frozenset()).sample(logits, [sequence(SamplingParams(9, temperature=temperature))])
    assert sampled.token == int(logits.argmax())


def test_penalties_count_what_was_generated_and_repetition_all() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 7], logits[0, 5] = 1.0, 0.9
    sampler = Sampler(frozenset())

    def token(tokens: list[int], **params: float) -> int | None:
        return sampler.sample(logits, [sequence(SamplingParams(9, temperature=0.0, **params), tokens)])[0].token

    assert token([7]) == 7
    assert token([7], presence_penalty=0.5) == 5
    assert token([7, 7], frequency_penalty=0.04) == 7
    assert token([7, 7], frequency_penalty=0.06) == 5
    assert token([7], repetition_penalty=2.0) == 7, "7 and 5 (of the prompt) are both halved"
    assert token([7], presence_penalty=0.5, repetition_penalty=20.0) == 5, "7 falls below zero"


def test_minimum_tokens_hold_back_the_end_and_bias_moves_any_token() -> None:
    logits = torch.zeros(1, 10)
    logits[0, EOS] = 5.0
    sampler = Sampler(frozenset([EOS]))
    held = SamplingParams(9, temperature=0.0, min_tokens=2)
    assert sampler.sample(logits, [sequence(held, [1])])[0].token != EOS
    assert sampler.sample(logits, [sequence(held, [1, 1])])[0].token == EOS
    biased = SamplingParams(9, temperature=0.0, logit_bias=((8, 6.0),))
    assert sampler.sample(logits, [sequence(biased)])[0].token == 8


def test_logits_that_are_no_numbers_give_no_token() -> None:
    logits = torch.zeros(2, 10)
    logits[1, 4] = math.nan
    both = [sequence(SamplingParams(9, temperature=0.0, logprobs=1)) for _ in range(2)]
    first, second = Sampler(frozenset()).sample(logits, both)
    assert first.token is not None
    assert second.token is None
    assert second.logprob is None


def test_logprobs_are_those_of_the_model_before_any_filter() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    entry = token_logprob(logits, 11, 3)
    expected = torch.log_softmax(logits.double(), 0)
    assert entry.logprob == pytest.approx(float(expected[11]))
    assert [token for token, _ in entry.top] == expected.topk(3).indices.tolist()
