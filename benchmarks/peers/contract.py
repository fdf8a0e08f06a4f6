"""What every peer's process has in common: a task in, timings and tokens out.

A peer is a script `peer.py TASK.json RESULT.json` run by the interpreter of its own environment. It hands `serve` a
function that loads the model and returns another that completes a list of lines. Loading, warming up and the timed
batch are told apart here, the same way for everyone.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WARM_UP_TOKENS = 48


@dataclass(frozen=True)
class Line:
    """A prompt as token ids and the number of tokens to generate, greedily and past any end-of-sequence token."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Task:
    """What the peer is to run. `scratch` is a folder of the peer's own, kept between runs; `device` is cpu or cuda."""

    model: Path
    dtype: str
    threads: int
    share_prefixes: bool
    scratch: Path
    options: dict[str, str]
    lines: list[Line]
    device: str = "cpu"

    @property
    def longest(self) -> int:
        """Tokens of the longest line, prompt and output."""
        return max(len(line.prompt) + line.max_tokens for line in self.lines)


Run = Callable[[list[Line]], list[list[int]]]


def read_task(path: Path) -> Task:
    """A task as the benchmark wrote it."""
    fields = json.loads(path.read_text())
    lines = [Line(prompt, tokens) for prompt, tokens in fields.pop("lines")]
    model, scratch = Path(fields.pop("model")), Path(fields.pop("scratch"))
    return Task(model=model, scratch=scratch, lines=lines, **fields)


def _cpu_s() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def serve(load: Callable[[Task], Run]) -> None:
    """Run the task named on the command line; never returns, for some peers leave threads that never end."""
    task, result = read_task(Path(sys.argv[1])), Path(sys.argv[2])
    try:
        started = time.perf_counter()
        run = load(task)
        loaded = time.perf_counter()
        run([Line(line.prompt[:WARM_UP_TOKENS], 4) for line in task.lines[:4]])
        warm, cpu = time.perf_counter(), _cpu_s()
        outputs = run(task.lines)
        done, cpu_done = time.perf_counter(), _cpu_s()
        figures = {"load_s": loaded - started, "warm_up_s": warm - loaded, "batch_s": done - warm}
        result.write_text(json.dumps({**figures, "batch_cpu_s": cpu_done - cpu, "outputs": outputs}))
    except BaseException:  # noqa: BLE001 - whatever it was, the process must end and say so
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
