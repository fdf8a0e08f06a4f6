#!/usr/bin/env python3
"""Score the results of a recall set: the share of right numbers by document length.

    python examples/recall/score_recall.py out/recall-answers.jsonl out/recall-results.jsonl
    python examples/recall/score_recall.py … --report out/report.json --json score.json   # to keep it

An answer is right if the number stands in it by itself, not as part of a longer one. A line without a result is wrong.
What is kept names the set by its digest, and the run by what `spillway run --report` wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Score:
    """Right answers of `tries`; the interval is Wilson's, at 95 %."""

    tries: int
    right: int
    share: float
    low: float
    high: float


def score_of(tries: int, right: int) -> Score:
    """A share with its uncertainty: few tries say little."""
    z = 1.96
    share = right / tries
    middle = (share + z * z / (2 * tries)) / (1 + z * z / tries)
    half = z * math.sqrt(share * (1 - share) / tries + z * z / (4 * tries * tries)) / (1 + z * z / tries)
    return Score(tries, right, share, max(0.0, middle - half), min(1.0, middle + half))


def is_right(number: str, answer: str) -> bool:
    """Whether the number stands in the answer; thousands may be set apart by a comma."""
    return number in re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer))


def score(answers: list[dict[str, Any]], results: dict[str, str]) -> dict[str, Score]:
    """By length in tokens, and `all`."""
    rights: dict[str, list[bool]] = {}
    for each in answers:
        right = is_right(each["number"], results.get(each["custom_id"], ""))
        rights.setdefault(str(each["length_tokens"]), []).append(right)
    rights["all"] = [right for group in rights.values() for right in group]
    return {name: score_of(len(group), sum(group)) for name, group in rights.items()}


def read_results(path: Path) -> dict[str, str]:
    """Answer texts by custom_id."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}


def table(scores: dict[str, Score]) -> str:
    """Markdown."""
    rows = ["| tokens | right | tries | share | 95 % interval |", "|---:|---:|---:|---:|---|"]
    for name, each in scores.items():
        rows.append(f"| {name} | {each.right} | {each.tries} | {each.share:.0%} | {each.low:.0%} to {each.high:.0%} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table; write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--report", type=Path, help="the report of the run that gave the results")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    arguments = parser.parse_args()
    answers = [json.loads(line) for line in arguments.answers.read_text(encoding="utf-8").splitlines()]
    scores = score(answers, read_results(arguments.results))
    print(table(scores))
    if arguments.json:
        kept: dict[str, Any] = {"answers_sha256": hashlib.sha256(arguments.answers.read_bytes()).hexdigest()}
        if arguments.report:
            report = json.loads(arguments.report.read_text(encoding="utf-8"))
            kept["run"] = {key: report[key] for key in ("command", "machine", "dtype", "device", "lines", "run_s")}
            kept["run"]["command"][0] = "spillway"
        kept["scores"] = {name: asdict(each) for name, each in scores.items()}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
