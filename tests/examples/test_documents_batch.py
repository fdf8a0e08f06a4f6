"""The shipped document batch: lines that Spillway takes, prompts that share their documents, facts that are in them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import make_batch
import pytest
import show_answers
from make_batch import HERE, PARTS, Question, questions

from spillway.api.lines import BatchLine, parse_line


def prompt(question: Question) -> str:
    line: dict[str, Any] = question.line()
    return str(line["body"]["messages"][1]["content"])


def same_beginning(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next(at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)]


@pytest.mark.parametrize("part", PARTS)
def test_every_line_is_a_valid_batch_line(part: str) -> None:
    for number, question in enumerate(questions(part), 1):
        line = parse_line(json.dumps(question.line()).encode(), number)
        assert isinstance(line, BatchLine), line


@pytest.mark.parametrize(("part", "lines"), [("first", 32), ("second", 32), ("long", 64)])
def test_custom_ids_are_unique(part: str, lines: int) -> None:
    assert len({question.custom_id for question in questions(part)}) == lines


@pytest.mark.parametrize("part", PARTS)
def test_questions_over_one_context_share_all_but_the_question(part: str) -> None:
    for _, group in groupby(questions(part), key=lambda question: question.documents):
        same = list(group)
        shared = same_beginning([prompt(question) for question in same])
        assert len(same) >= 8
        assert all(len(prompt(question)) - len(shared) < 120 for question in same)
        assert len(shared) > 6000


def test_the_two_short_parts_ask_different_things_about_the_same_documents() -> None:
    first, second = questions("first"), questions("second")
    assert not {each.custom_id for each in first} & {each.custom_id for each in second}
    assert {each.documents for each in first} == {each.documents for each in second}


def test_what_counts_as_right_stands_in_the_document() -> None:
    for part in PARTS:
        for question in questions(part):
            assert any(fact in prompt(question) for fact in question.facts), question.question


def test_lines_take_turns_between_documents() -> None:
    order = [question.documents for question in make_batch.interleaved(questions("first"))]
    assert len(set(order[:4])) == 4
    assert len(order) == 32


def results_file(folder: Path, answers: dict[str, str]) -> Path:
    rows = [
        {"custom_id": custom_id, "response": {"body": {"choices": [{"message": {"content": text}}]}}}
        for custom_id, text in answers.items()
    ]
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_answers_are_shown_beside_their_questions_and_counted(tmp_path: Path) -> None:
    given = {
        "lighthouse-0": "AGNES THORBURN, the engineer.",
        "lighthouse-1": "In 1901.",
        "railway-0": "Constance Avery",
    }
    found = show_answers.answers(results_file(tmp_path, given))
    text = show_answers.report(questions("first"), found)
    assert "✓ Who built the tower of Skarn Point Light?\n      AGNES THORBURN, the engineer." in text
    assert "· In which year was the tower built?\n      In 1901." in text
    assert "no result" in text
    assert text.endswith("2 of 32 answers say what the document says.")


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    script = HERE / "show_answers.py"
    path = results_file(tmp_path, {"mine": "hello"})
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not results of a batch" in done.stderr
