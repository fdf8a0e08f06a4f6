"""Batch files, jobs and results for the tests of the gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spillway.api.results import Choice, Usage, chat_body, completion_body
from spillway.gateway.job import Job, RequestLine
from spillway.gateway.options import JobOptions
from spillway.gateway.paths import JobPaths

OPTIONS = JobOptions(model="tiny@1", dtype="float32")
RESTART = replace(OPTIONS, restart=True)


def request(custom_id: str, prompt: str = "hi", **fields: Any) -> bytes:
    body = {"model": "m", "prompt": prompt} | fields
    row = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(row).encode()


def requests(count: int) -> list[bytes]:
    return [request(f"r{number}", f"{number % 3} " * 50 + str(number)) for number in range(count)]


def paths_in(directory: Path) -> JobPaths:
    return JobPaths(directory / "in.jsonl", directory / "out.jsonl", directory / "errors.jsonl")


def write_input(directory: Path, lines: Iterable[bytes], ending: bytes = b"\n") -> JobPaths:
    paths = paths_in(directory)
    paths.input.write_bytes(b"".join(line + ending for line in lines))
    return paths


def answer(line: RequestLine) -> bytes:
    """A body that follows from the request alone, as a real engine's does."""
    build = chat_body if line.url == "/v1/chat/completions" else completion_body
    return build(line.head, [Choice(0, f"answer to {line.custom_id}", "stop")], Usage(1, 1))


def drain(job: Job) -> int:
    done = 0
    for line in job.pending():
        done += job.complete(line.index, answer(line))
    return done


def run(paths: JobPaths, options: JobOptions = OPTIONS) -> Job:
    """Opens, drains, seals and closes."""
    with Job.open(paths, options) as job:
        drain(job)
        job.seal()
    return job


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def names(path: Path) -> list[str | None]:
    return [row["custom_id"] for row in rows(path)]


if __name__ == "__main__":  # a process of its own, for tests that kill it
    run(paths_in(Path(sys.argv[1])))
