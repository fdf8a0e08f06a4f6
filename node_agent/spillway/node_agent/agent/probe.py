"""A question with a known answer: shows that weights, kernels, pool and sampler work before lines are taken."""

from __future__ import annotations

import hashlib

from spillway.api.errors import SpillwayError
from spillway.node_agent.engine import Engine, RequestFailure
from spillway.node_agent.request import Request, SamplingParams

PROMPT_TOKENS, ANSWER_TOKENS = 8, 16


class ProbeError(SpillwayError):
    """The engine does not answer as it must."""


def known_answer(engine: Engine, vocab: int, block_tokens: int) -> str:
    """Ask twice; the digest of the greedy answer, in hex. For an engine without lines.

    The prompt is shorter than a block, so no KV is found and both runs compute the very same: in any dtype a difference
    is a fault. The same weights on the same kind of device give the same digest on every host.

    Raises:
        ProbeError: the answers differ, or there is none.
    """
    first, second = (_ask(engine, number, vocab, min(PROMPT_TOKENS, block_tokens)) for number in (-1, -2))
    if first != second:
        raise ProbeError("the model answered one question in two ways", "Check the device: its results are not stable.")
    return hashlib.sha256(b" ".join(b"%d" % token for token in first)).hexdigest()


def _ask(engine: Engine, number: int, vocab: int, prompt_tokens: int) -> list[int]:
    prompt = tuple((7919 * place + 13) % vocab for place in range(prompt_tokens))
    params = SamplingParams(max_tokens=min(ANSWER_TOKENS, engine.pool_tokens - len(prompt)), temperature=0.0)
    engine.add(Request(number, prompt, params, order=number))
    while engine.num_requests:
        for outcome in engine.step():
            if isinstance(outcome, RequestFailure):
                raise ProbeError(f"the model cannot answer: {outcome.kind.value}")
            return outcome.sequences[0].generated
    raise ProbeError("the model gave no answer")
