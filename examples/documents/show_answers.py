#!/usr/bin/env python3
"""The answers of a finished document batch beside their questions.

    python examples/documents/show_answers.py results.jsonl

A tick marks an answer that says what the document says. The model is small and gets many wrong by itself; what matters
is that the answers are the same however the KV cache travelled. A damaged cache gives gibberish here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from make_batch import PARTS, Question, questions


def answers(results: Path) -> dict[str, str]:
    """The answer of each line that has one, by custom_id."""
    rows = (json.loads(line) for line in results.read_text(encoding="utf-8").splitlines())
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"].strip() for row in rows}


def is_right(question: Question, answer: str) -> bool:
    """Whether the answer says one of the facts, whatever the case of its letters."""
    return any(fact.lower() in answer.lower() for fact in question.facts)


def report(asked: list[Question], answered: dict[str, str]) -> str:
    """A paragraph for each document, and the count of right answers."""
    lines: list[str] = []
    documents: tuple[str, ...] = ()
    for question in asked:
        if question.documents != documents:
            documents = question.documents
            lines += ["", " + ".join(documents)]
        answer = answered.get(question.custom_id)
        mark = " " if answer is None else "✓" if is_right(question, answer) else "·"
        lines.append(f"  {mark} {question.question}")
        lines.append(f"      {' '.join((answer or 'no result').split())}")
    right = sum(q.custom_id in answered and is_right(q, answered[q.custom_id]) for q in asked)
    return "\n".join([*lines, "", f"{right} of {len(asked)} answers say what the document says."])


def main() -> int:
    """Print the report for the part that the results belong to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    found = answers(parser.parse_args().results)
    asked = next((each for each in map(questions, PARTS) if {q.custom_id for q in each} & found.keys()), None)
    if asked is None:
        print("error: these are not results of a batch that make_batch.py made", file=sys.stderr)
        return 1
    print(report(asked, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
