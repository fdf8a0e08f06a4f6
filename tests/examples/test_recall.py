"""The recall set: what is asked is in the document, the same seed gives the same set, and the score counts numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import score_recall
from hypothesis import given
from hypothesis import strategies as st
from make_recall import FACTS, make_set, make_try

from spillway.api.lines import BatchLine, parse_line


def words(text: str) -> int:
    return len(text.split())


def test_the_same_seed_gives_the_same_set_and_another_one_another() -> None:
    assert make_set([256], 4, 7, words) == make_set([256], 4, 7, words)
    assert make_set([256], 4, 7, words) != make_set([256], 4, 8, words)


def test_a_longer_set_begins_with_the_shorter_one() -> None:
    assert make_set([256], 8, 0, words)[:4] == make_set([256], 4, 0, words)


@given(length=st.integers(64, 2000), number=st.integers(0, 50), seed=st.integers(0, 1000))
def test_the_document_has_its_length_and_holds_the_fact_once(length: int, number: int, seed: int) -> None:
    made = make_try(length, number, seed, words)
    assert length - 16 <= words(made.text) <= length
    assert made.text.count(f"The secret number of {made.name} is {made.number}.") == 1
    assert made.text.count("The secret number of ") == FACTS
    assert made.text.count(made.number) == 1
    assert 0 <= made.depth <= 1


def test_every_line_is_a_valid_batch_line() -> None:
    for made in make_set([256, 512], 3, 0, words):
        assert isinstance(parse_line(json.dumps(made.line("m")).encode(), 1), BatchLine)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The secret number of Ada is 4711.", True),
        ("4711", True),
        ("It is 4,711.", True),
        ("It is 14711.", False),
        ("47 11", False),
        ("", False),
    ],
)
def test_an_answer_is_right_if_the_number_stands_in_it_by_itself(answer: str, right: bool) -> None:
    assert score_recall.is_right("4711", answer) is right


def test_a_line_without_a_result_is_wrong_and_lengths_are_apart() -> None:
    answers = [
        {"custom_id": "a", "length_tokens": 256, "number": "1111"},
        {"custom_id": "b", "length_tokens": 256, "number": "2222"},
        {"custom_id": "c", "length_tokens": 512, "number": "3333"},
    ]
    scores = score_recall.score(answers, {"a": "1111", "c": "3333"})
    assert {name: (each.right, each.tries) for name, each in scores.items()} == {
        "256": (1, 2),
        "512": (1, 1),
        "all": (2, 3),
    }


@given(tries=st.integers(1, 500), data=st.data())
def test_the_interval_holds_the_share(tries: int, data: st.DataObject) -> None:
    each = score_recall.score_of(tries, data.draw(st.integers(0, tries)))
    assert 0 <= each.low <= each.share + 1e-9
    assert each.share - 1e-9 <= each.high <= 1


def test_the_scorer_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    answers, results, out = tmp_path / "answers.jsonl", tmp_path / "results.jsonl", tmp_path / "score.json"
    answers.write_text('{"custom_id": "a", "length_tokens": 256, "number": "1111", "depth": 0.5}\n')
    body = {"choices": [{"message": {"content": "1111"}}]}
    results.write_text(json.dumps({"custom_id": "a", "response": {"body": body}}) + "\n")
    command = [sys.executable, score_recall.__file__, str(answers), str(results), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| 256 | 1 | 1 | 100% |" in done.stdout
    assert json.loads(out.read_text())["scores"]["all"]["share"] == 1.0
