#!/usr/bin/env python3
"""A batch file in which many questions share a few long documents.

    python examples/documents/make_batch.py batch.jsonl                 # 32 questions over four documents
    python examples/documents/make_batch.py more.jsonl --part second    # 32 other questions over the same four
    python examples/documents/make_batch.py long.jsonl --part long      # 64 questions over 3,400 to 5,300 tokens each

A prompt is the document first and the question last, so all questions over a document share its tokens as a prefix.
The long part strings documents together; one of its four contexts is another's beginning.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = "SmolLM2-135M-Instruct"
INSTRUCTION = "Answer the question from the text in one short sentence."
MAX_TOKENS = 40
LONG_CONTEXTS = (
    ("lighthouse", "chronicle"),
    ("glasshouse", "railway"),
    ("lighthouse", "chronicle", "railway"),
    ("railway", "chronicle", "glasshouse"),
)
PARTS = ("first", "second", "long")


@dataclass(frozen=True)
class Question:
    """One line of the batch: what is asked over which documents, and what a right answer says (any one of them)."""

    custom_id: str
    documents: tuple[str, ...]
    question: str
    facts: tuple[str, ...]

    def line(self) -> dict[str, object]:
        """As an OpenAI batch line."""
        text = "\n".join((HERE / "texts" / f"{name}.md").read_text(encoding="utf-8") for name in self.documents)
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"{text}\n\nQuestion: {self.question}"},
        ]
        body = {"model": MODEL, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
        return {"custom_id": self.custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def questions(part: str) -> list[Question]:
    """The questions of a part, document by document."""
    known: dict[str, list[tuple[str, list[str]]]] = json.loads((HERE / "questions.json").read_text(encoding="utf-8"))
    chosen: list[Question] = []
    if part == "long":
        for names in LONG_CONTEXTS:
            for number in range(16):
                asked, facts = known[names[number % len(names)]][number]
                chosen.append(Question(f"{'+'.join(names)}-{number}", names, asked, tuple(facts)))
        return chosen
    numbers = range(8) if part == "first" else range(8, 16)
    for name, pairs in known.items():
        chosen += [
            Question(f"{name}-{number}", (name,), pairs[number][0], tuple(pairs[number][1])) for number in numbers
        ]
    return chosen


def interleaved(asked: list[Question]) -> list[Question]:
    """Taking turns between the documents, as lines of a real file may come; Spillway brings them together."""
    by_context: dict[tuple[str, ...], list[Question]] = {}
    for question in asked:
        by_context.setdefault(question.documents, []).append(question)
    return [question for turn in zip(*by_context.values(), strict=True) for question in turn]


def main() -> None:
    """Write the batch file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--part", choices=PARTS, default="first")
    arguments = parser.parse_args()
    with arguments.output.open("w", encoding="utf-8") as file:
        for question in interleaved(questions(arguments.part)):
            file.write(json.dumps(question.line(), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
