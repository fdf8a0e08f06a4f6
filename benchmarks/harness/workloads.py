"""What the peers are given: seeded token-id prompts, each with the number of tokens to generate."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from harness.models import Shape

FIRST_PLAIN_TOKEN = 300
"""Tokens below are special ones or single bytes in the tokenizers used here."""


@dataclass(frozen=True)
class Workload:
    """Lines of (prompt token ids, tokens to generate); every end-of-sequence token is ignored."""

    name: str
    lines: list[tuple[list[int], int]]
    shares_prefixes: bool = False
    kv_gib: int = 4
    """KV memory that everybody gets: enough for 64 lines at once, but for `documents`."""

    @property
    def prompt_tokens(self) -> int:
        """Sum over the lines."""
        return sum(len(prompt) for prompt, _ in self.lines)

    @property
    def output_tokens(self) -> int:
        """Sum over the lines."""
        return sum(tokens for _, tokens in self.lines)

    def write_jsonl(self, path: Path, model: str) -> None:
        """As a batch file for `spillway run`; special tokens are kept so that text and tokens tell the same."""
        with path.open("w") as file:
            for number, (prompt, tokens) in enumerate(self.lines):
                body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
                body |= {"ignore_eos": True, "skip_special_tokens": False}
                line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def flops(self, shape: Shape) -> int:
        """Floating-point operations that cannot be avoided: a shared prefix counts once, padding never.

        Each line's last token is sampled and not computed further.
        """
        total, seen = 0, set()
        for prompt, tokens in self.lines:
            shared = 0
            for at in range(PREFIX_STEP, len(prompt), PREFIX_STEP):
                prefix = tuple(prompt[:at])
                if prefix in seen:
                    shared = at
                seen.add(prefix)
            end = len(prompt) + tokens - 1
            total += (end - shared) * shape.token_flops + tokens * shape.head_flops
            total += shape.attention_flops(1) * (end * (end + 1) - shared * (shared + 1)) // 2
        return total


PREFIX_STEP = 16


def _ids(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    return [rng.randrange(FIRST_PLAIN_TOKEN, vocabulary) for _ in range(count)]


def make(name: str, vocabulary: int, seed: int = 0) -> Workload:
    """A workload by name.

    mixed: 128 lines, prompts of 32 to 512 tokens, outputs of 16 to 128.  equal-64: 64 lines of 64 tokens, 64 out.
    equal-256: 128 lines of 256 tokens, 64 out.  shared: 64 lines, 16 over each of four documents of 768 tokens, with
    a question of 32 tokens of their own, 32 out.  documents: 72 lines, four over each of 18 documents of 1536 tokens,
    one document after the other and round again, with 32 tokens of their own, 16 out, in KV memory for ten documents.

    Raises:
        KeyError: no such workload.
    """
    rng = random.Random(f"{name}/{seed}")
    if name == "shared":
        documents = [_ids(rng, 768, vocabulary) for _ in range(4)]
        lines = [(documents[number % 4] + _ids(rng, 32, vocabulary), 32) for number in range(64)]
        return Workload(name, lines, shares_prefixes=True)
    if name == "documents":
        documents = [_ids(rng, 1536, vocabulary) for _ in range(18)]
        lines = [(documents[number % 18] + _ids(rng, 32, vocabulary), 16) for number in range(72)]
        return Workload(name, lines, shares_prefixes=True, kv_gib=1)
    if name == "mixed":
        sizes = [(rng.randint(32, 512), rng.randint(16, 128)) for _ in range(128)]
    else:
        sizes = {"equal-64": [(64, 64)] * 64, "equal-256": [(256, 64)] * 128}[name]
    return Workload(name, [(_ids(rng, prompt, vocabulary), output) for prompt, output in sizes])


WORKLOADS = ("mixed", "equal-64", "equal-256", "shared", "documents")
