"""Batch files for the tests of the command, and ways to run and read them."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

from spillway.cli.options import Device, Dtype, EngineOptions
from spillway.cli.run import RunOptions, run
from spillway.gateway.paths import JobPaths

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "keys", "document"]


def text(seed: int, words: int) -> str:
    chooser = random.Random(seed)
    return " ".join(chooser.choice(WORDS) for _ in range(words))


def completion(custom_id: str, prompt: Any, **body: Any) -> dict[str, Any]:
    fields = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": fields}


def chat(custom_id: str, content: str, **body: Any) -> dict[str, Any]:
    fields = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": fields | body}


def mixed_lines() -> list[dict[str, Any]]:
    """Lines that share documents, lines that do not, every way to choose tokens, several choices, several prompts."""
    documents = [text(seed, 60 + 20 * seed) for seed in range(3)]
    lines = [
        completion(f"doc{number}", f"{documents[number % 3]} {text(100 + number, 4 + number % 7)}", ignore_eos=True)
        for number in range(18)
    ]
    lines += [chat(f"chat{number}", text(200 + number, 3 + 5 * number)) for number in range(6)]
    lines += [
        completion("sampled", text(300, 9), temperature=0.9, top_p=0.9, seed=7),
        completion("unseeded", text(301, 9), temperature=1.2, top_k=20),
        completion("minp", text(302, 9), temperature=1.5, min_p=0.02, seed=-5),
        completion("choices", documents[0], n=4, temperature=1.0, seed=3, max_tokens=20),
        completion("prompts", [documents[1], "a lazy dog", documents[1]], n=2, temperature=0.7),
        completion("tokens", [[5, 9, 200], [17]], max_tokens=5),
        completion("stopped", text(303, 20), stop=["e", "qu"], max_tokens=40, ignore_eos=True),
        completion("logprobs", text(304, 8), logprobs=3),
        chat("toplogprobs", text(305, 8), logprobs=True, top_logprobs=2),
        completion("penalties", text(306, 12), presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
        completion("biased", text(307, 12), logit_bias={"40": 100}, max_tokens=3),
        completion("minimum", text(308, 12), min_tokens=8, stop_token_ids=[41, 42, 43]),
        completion("long", text(309, 110), max_tokens=60, ignore_eos=True),
    ]
    # Short prompts with long answers: they fit a small pool when they start, and have outgrown it when they end.
    lines += [
        completion(f"long{number}", text(400 + number, 3), max_tokens=110 + number, ignore_eos=True)
        for number in range(8)
    ]
    return lines


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines))
    return path


def options(model: Path, source: Path, output: Path, **changes: Any) -> RunOptions:
    """``changes``: fields of `RunOptions` or of its engine."""
    values: dict[str, Any] = {
        "model": str(model),
        "paths": JobPaths(source, output, output.with_name(output.name + ".errors")),
        "dtype": Dtype.FLOAT32,
        "device": Device.CPU,
        "device_kv_bytes": 16 << 20,
        "host_kv_bytes": 0,
        "disk_kv_bytes": 0,
        "max_batch_tokens": 64,
        "max_sequences": 64,
        "report": output.with_name(output.name + ".report"),
        "restart": False,
    } | changes
    engine = {field.name: values.pop(field.name) for field in fields(EngineOptions) if field.name in values}
    return RunOptions(EngineOptions(**engine), **values)


def run_batch(model: Path, source: Path, output: Path, **changes: Any) -> tuple[bytes, dict[str, Any]]:
    """Run to the end; the output without its timestamps, and the report."""
    asked = options(model, source, output, **changes)
    assert run(asked) == 0
    assert asked.report is not None
    return without_times(output), json.loads(asked.report.read_text())


def without_times(output: Path) -> bytes:
    rows = []
    for line in output.read_bytes().splitlines():
        row = json.loads(line)
        row["response"]["body"]["created"] = 0
        rows.append(json.dumps(row, ensure_ascii=False).encode())
    return b"\n".join(rows)


def bodies(output: Path) -> dict[str, dict[str, Any]]:
    """Response bodies by custom_id; each id once."""
    rows = [json.loads(line) for line in output.read_bytes().splitlines()]
    found = {row["custom_id"]: row["response"]["body"] for row in rows}
    assert len(found) == len(rows), "a line has two results"
    return found
