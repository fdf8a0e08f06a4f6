"""The real model over long shared documents: the text that transformers' greedy decoding gives, with KV spilled.

Sixty-four questions over contexts of 3,400 to 5,300 tokens, in float32. A difference is excused only where the two best
logits of the reference lie within 1e-3 at the token where the texts part, and is printed.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from fetch_smollm2 import default_cache, fetch
from make_batch import MAX_TOKENS, Question, interleaved, questions
from show_answers import answers

TIE = 1e-3


@dataclass(frozen=True)
class Reference:
    """Greedy tokens of one line, and at each the distance between the two best logits."""

    tokens: list[int]
    gaps: list[float]


def same_start(rows: list[list[int]]) -> int:
    first, last = min(rows), max(rows)
    return next(at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)


def references(model: Any, tokenizer: Any, asked: list[Question]) -> dict[str, Reference]:
    """One sequence at a time, nothing padded; only the KV of what a context's questions share is kept between them."""
    import torch

    found: dict[str, Reference] = {}
    with torch.inference_mode():
        for _, group in groupby(asked, key=lambda question: question.documents):
            same = list(group)
            messages = [question.line()["body"]["messages"] for question in same]
            prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in messages]
            shared = same_start(prompts)
            context = model(torch.tensor([prompts[0][:shared]]), logits_to_keep=1).past_key_values
            for question, prompt in zip(same, prompts, strict=True):
                found[question.custom_id] = greedy(model, copy.deepcopy(context), prompt[shared:])
    return found


def greedy(model: Any, cache: Any, rest: list[int]) -> Reference:
    import torch

    tokens: list[int] = []
    gaps: list[float] = []
    step = torch.tensor([rest])
    while len(tokens) < MAX_TOKENS:
        best = model(step, past_key_values=cache, logits_to_keep=1).logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        if tokens[-1] == model.generation_config.eos_token_id:
            break
        step = torch.tensor([tokens[-1:]])
    return Reference(tokens, gaps)


def parting(tokenizer: Any, reference: Reference, text: str) -> int | None:
    """The token of the reference at which a text parts from it; None if they are the same."""
    if tokenizer.decode(reference.tokens, skip_special_tokens=True) == text:
        return None
    for at in range(len(reference.tokens)):
        start = tokenizer.decode(reference.tokens[: at + 1], skip_special_tokens=True)
        if not text.startswith(start.rstrip("\ufffd")):
            return at
    return len(reference.tokens) - 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sixty_four_questions_over_long_documents_are_answered_as_transformers_does(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = fetch(default_cache())
    asked = questions("long")
    batch, results, numbers = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "report.json"))
    batch.write_text("".join(json.dumps(question.line()) + "\n" for question in interleaved(asked)), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("spillway")), "run", "--model", str(checkpoint), "--dtype", "float32"]
    command += ["--input", str(batch), "--output", str(results), "--report", str(numbers)]
    command += ["--device-kv", "320MiB", "--host-kv", "64MiB", "--disk-kv", "2GiB", "--disk-dir", str(tmp_path / "kv")]
    subprocess.run(command, check=True)
    tiers = json.loads(numbers.read_text())["store"]["tiers"]
    assert tiers["disk"]["stores"] > 0
    assert all(tier["verify_failures"] == 0 for tier in tiers.values())

    texts = {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"]
        for row in map(json.loads, results.read_text(encoding="utf-8").splitlines())
    }
    assert texts.keys() == {question.custom_id for question in asked}
    assert answers(results).keys() == texts.keys()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    wrong = []
    for custom_id, reference in references(model, tokenizer, asked).items():
        at = parting(tokenizer, reference, texts[custom_id])
        if at is None:
            continue
        print(f"{custom_id}: parts at token {at}, the reference's two best logits are {reference.gaps[at]:.2g} apart")
        if reference.gaps[at] > TIE:
            wrong.append(custom_id)
    assert not wrong
