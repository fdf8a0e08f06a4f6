"""How jobs look: a table, one line, JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from spillway.api.batch.v1 import batch_pb2
from spillway.cli.progress import format_duration

_FINAL = {
    batch_pb2.Job.COMPLETED,
    batch_pb2.Job.CANCELLED,
    batch_pb2.Job.EXPIRED,
    batch_pb2.Job.FAILED,
}
PLAIN_INTERVAL_S = 10.0


def is_final(job: batch_pb2.Job) -> bool:
    """Whether nothing will change any more."""
    return job.state in _FINAL


def state(job: batch_pb2.Job) -> str:
    """In lower case."""
    return batch_pb2.Job.State.Name(job.state).lower()


def as_json(job: batch_pb2.Job) -> str:
    """One line; names as in the proto, 64-bit numbers as strings, as protobuf's JSON has them."""
    found: dict[str, Any] = MessageToDict(
        job, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return json.dumps(found, ensure_ascii=False)


def summary(job: batch_pb2.Job) -> str:
    """One line for people: state, counts, the most frequent errors, why it waits."""
    lines = job.lines
    parts = [f"{state(job)}: {lines.completed} of {lines.total} lines answered"]
    if lines.failed:
        codes = sorted(lines.failed_by_code.items(), key=lambda each: -each[1])[:3]
        parts.append(f"{lines.failed} failed ({', '.join(f'{code} {count}' for code, count in codes)})")
    if lines.leased:
        parts.append(f"{lines.leased} running")
    if job.tokens.per_second:
        parts.append(f"{job.tokens.per_second:,.0f} tokens/s")
    if job.HasField("latest_end_time"):
        parts.append(f"ends in {end_band(job)}")
    parts += [job.waiting_reason] if job.waiting_reason else []
    parts += [job.error.message] if job.HasField("error") else []
    parts += [f"mended: {each}" for each in job.repairs]
    return "; ".join(parts)


def end_band(job: batch_pb2.Job) -> str:
    """ "5m 00s to 7m 30s", or empty while nobody can tell."""
    if not job.HasField("latest_end_time"):
        return ""
    times = (job.earliest_end_time, job.latest_end_time)
    early, late = (format_duration(max(0.0, each.ToMilliseconds() / 1000 - time.time())) for each in times)
    return early if early == late else f"{early} to {late}"


def print_table(jobs: list[batch_pb2.Job]) -> None:
    """To stdout."""
    table = Table("job", "name", "model", "state", "done", "failed", "lines", "tokens", "ends in", "age", box=None)
    for job in jobs:
        age = format_duration(max(0.0, time.time() - job.create_time.ToSeconds()))
        tokens = job.tokens.prompt + job.tokens.completion
        counts = (str(each) for each in (job.lines.completed, job.lines.failed, job.lines.total, tokens))
        table.add_row(job.name, job.display_name, job.model, state(job), *counts, end_band(job), age)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


class Watching:
    """Shows a job as it goes: a bar on a terminal, elsewhere a plain line when the state changes or time has passed."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._said, self._said_s = "", float("-inf")
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=None, note="")

    def __enter__(self) -> Watching:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, job: batch_pb2.Job) -> None:
        """The newest state."""
        if self._bar is not None:
            done = job.lines.completed + job.lines.failed
            note = summary(job).partition(": ")[2]
            self._bar.update(
                self._task, description=state(job), completed=done, total=job.lines.total or None, note=note
            )
        elif state(job) != self._said or time.monotonic() - self._said_s > PLAIN_INTERVAL_S:
            self._said, self._said_s = state(job), time.monotonic()
            print(f"spillway: {job.name} {summary(job)}", file=sys.stderr, flush=True)
