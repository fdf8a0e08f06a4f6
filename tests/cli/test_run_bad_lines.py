"""A bad line becomes a coded error; the others run as if it were not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batches import bodies, chat, completion, options, run_batch, text, write_lines

from spillway.cli.run import run

GOOD = [completion("good1", "a lazy dog"), chat("good2", "the quick brown fox")]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


def errors_of(output: Path) -> list[dict[str, Any]]:
    path = output.with_name(output.name + ".errors")
    return [json.loads(line) for line in path.read_text().splitlines()]


CASES: list[tuple[str, Any, str]] = [
    ("not JSON", "{", "invalid_json"),
    ("unknown field", completion("bad", "a", surprise=1), "unknown_parameter"),
    ("prompt longer than the context", completion("bad", [[7] * 600]), "context_length_exceeded"),
    ("output longer than the context", completion("bad", "a", max_tokens=512), "context_length_exceeded"),
    ("prompt longer than the pool", completion("bad", [[7] * 400]), "kv_capacity_exceeded"),
    ("duplicate custom_id", completion("good1", "again"), "duplicate_custom_id"),
    ("NaN", json.dumps(completion("bad", "a", temperature=float("nan"))), "invalid_parameter"),
    ("10 MB line", completion("bad", "x" * 10_000_000), "line_too_long"),
    ("token outside the vocabulary", completion("bad", [[1, 99999]]), "invalid_parameter"),
    ("bias outside the vocabulary", completion("bad", "a", logit_bias={"99999": 1}), "invalid_parameter"),
    (
        "role the template refuses",
        chat("bad", "a", messages=[{"role": "tool", "content": "a"}]),
        "chat_template_failed",
    ),
    ("empty prompt", completion("bad", ""), "invalid_parameter"),
    ("unsupported", chat("bad", "a", tools=[{"type": "function"}]), "unsupported_parameter"),
]


def test_bad_lines_are_coded_and_the_rest_runs(model: Path, tmp_path: Path) -> None:
    alone, _ = run_batch(model, write_lines(tmp_path / "good.jsonl", GOOD), tmp_path / "alone.jsonl")
    source = write_lines(tmp_path / "in.jsonl", [*GOOD, *(_numbered(number) for number in range(len(CASES)))])
    _, report = run_batch(model, source, tmp_path / "out.jsonl", device_kv_bytes=24 * 12288)
    assert report["lines"]["succeeded"] == 2
    assert report["lines"]["failed"] == len(CASES)
    assert report["lines"]["done_before"] == 0
    texts = {name: body["choices"] for name, body in bodies(tmp_path / "out.jsonl").items()}
    assert texts == {name: body["choices"] for name, body in bodies(tmp_path / "alone.jsonl").items()}
    assert alone
    found = {row["error"]["line"]: row["error"]["code"] for row in errors_of(tmp_path / "out.jsonl")}
    assert found == {3 + number: code for number, (_, _, code) in enumerate(CASES)}


def _numbered(number: int) -> Any:
    line = CASES[number][1]
    return line | {"custom_id": f"bad{number}"} if isinstance(line, dict) and line["custom_id"] == "bad" else line


def test_a_sequence_that_outgrows_the_pool_gets_a_code_not_a_shorter_answer(model: Path, tmp_path: Path) -> None:
    lines = [*GOOD, completion("grows", text(1, 20), max_tokens=300, ignore_eos=True)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    _, report = run_batch(model, source, tmp_path / "out.jsonl", device_kv_bytes=6 * 12288, host_kv_bytes=1 << 20)
    assert report["lines"]["succeeded"] == 2
    (row,) = errors_of(tmp_path / "out.jsonl")
    assert (row["custom_id"], row["error"]["code"]) == ("grows", "kv_capacity_exceeded")
    assert "--device-kv" in row["error"]["message"]


def test_a_model_for_contexts_beyond_any_memory_runs_what_the_pool_holds(model: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(model, tmp_path / "endless")
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**12}))
    source = write_lines(tmp_path / "in.jsonl", [*GOOD, completion("long", [[7] * 1600])])
    _, report = run_batch(endless, source, tmp_path / "out.jsonl", device_kv_bytes=100 * 12288)
    assert report["lines"]["succeeded"] == 2
    (row,) = errors_of(tmp_path / "out.jsonl")
    assert (row["custom_id"], row["error"]["code"]) == ("long", "kv_capacity_exceeded")


def test_a_job_of_bad_lines_only_still_ends(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["nonsense", "{}"])
    assert run(options(model, source, tmp_path / "out.jsonl")) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert len(errors_of(tmp_path / "out.jsonl")) == 2
