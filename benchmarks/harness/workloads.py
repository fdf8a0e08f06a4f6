"""What the peers are given: seeded token-id prompts, each with the number of tokens to generate."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
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
    prompts_per_line: int = 1
    """How many of `lines` at a time stand in one line of the batch file; for Spillway alone."""

    @property
    def batch_lines(self) -> int:
        """Lines of the batch file."""
        return len(self.lines) // self.prompts_per_line

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
            several = self.prompts_per_line
            for number in range(self.batch_lines):
                prompts, (tokens, *_) = zip(*self.lines[number * several : (number + 1) * several], strict=True)
                body = {"model": model, "prompt": prompts[0] if several == 1 else prompts}
                body |= {"max_tokens": tokens, "temperature": 0}
                body |= {"ignore_eos": True, "skip_special_tokens": False}
                line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def flops(self, shape: Shape) -> int:
        """Floating-point operations that cannot be avoided: a shared prefix counts once, padding never.

        Each line's last token is sampled and not computed further.
        """
        total = 0
        for shared, end, tokens in self._work():
            total += (end - shared) * shape.token_flops + tokens * shape.head_flops
            total += shape.attention_flops(1) * (end * (end + 1) - shared * (shared + 1)) // 2
        return total

    def different_tokens(self) -> int:
        """Tokens whose KV differs from that of all others: a shared prefix counts once."""
        return sum(end - shared for shared, end, _ in self._work())

    def _work(self) -> Iterator[tuple[int, int, int]]:
        """Per prompt: tokens shared with one before, tokens whose KV is computed, tokens sampled."""
        seen = set()
        for prompt, tokens in self.lines:
            shared = 0
            for at in range(PREFIX_STEP, len(prompt), PREFIX_STEP):
                prefix = tuple(prompt[:at])
                if prefix in seen:
                    shared = at
                seen.add(prefix)
            yield shared, len(prompt) + tokens - 1, tokens


PREFIX_STEP = 16


def _ids(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    return [rng.randrange(FIRST_PLAIN_TOKEN, vocabulary) for _ in range(count)]


def make(name: str, vocabulary: int, seed: int = 0) -> Workload:
    """A workload by name.

    mixed: 128 lines, prompts of 32 to 512 tokens, outputs of 16 to 128.  equal-64: 64 lines of 64 tokens, 64 out.
    equal-256: 128 lines of 256 tokens, 64 out.  shared: 64 lines, 16 over each of four documents of 768 tokens, with
    a question of 32 tokens of their own, 32 out.  documents: 72 lines, four over each of 18 documents of 1536 tokens,
    one document after the other and round again, with 32 tokens of their own, 16 out, in KV memory for ten documents.
    panels: 24 lines with four prompts each, over four of 12 documents of 768 tokens drawn by chance, with 32 tokens of
    their own, 8 out: no order of the lines brings the questions about a document together.

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
    if name == PANELS:
        documents = [_ids(rng, 768, vocabulary) for _ in range(12)]
        chosen = [document for _ in range(24) for document in rng.sample(documents, 4)]
        lines = [(document + _ids(rng, 32, vocabulary), 8) for document in chosen]
        return Workload(name, lines, shares_prefixes=True, prompts_per_line=4)
    if name == "mixed":
        sizes = [(rng.randint(32, 512), rng.randint(16, 128)) for _ in range(128)]
    else:
        sizes = {"equal-64": [(64, 64)] * 64, "equal-256": [(256, 64)] * 128}[name]
    return Workload(name, [(_ids(rng, prompt, vocabulary), output) for prompt, output in sizes])


PANELS = "panels"
"""Has several prompts a line, and no peer reads such a file."""
WORKLOADS = ("mixed", "equal-64", "equal-256", "shared", "documents")
