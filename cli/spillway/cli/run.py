"""`spillway run`: one batch file through one model on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from spillway.api.errors import SpillwayError
from spillway.api.otlp import tracing
from spillway.api.tracing import TRACEPARENT_VARIABLE, Attribute, OpenSpan
from spillway.cli.drive import Driver, Tally
from spillway.cli.engine_options import chosen_dtype, describe_tiers, engine_config
from spillway.cli.options import EngineOptions
from spillway.cli.progress import RunProgress
from spillway.cli.report import LineCounts, RunReport
from spillway.gateway.job import Job
from spillway.gateway.options import JobOptions
from spillway.gateway.paths import JobPaths
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.completion import LineTranslator
from spillway.node_agent.load import LoadedModel, load_engine

EXIT_INTERRUPTED = 130
KV_FOLDER = "kv"
"""In the job's folder: where KV on disk lies if the user named no directory."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the user asked for."""

    engine: EngineOptions
    paths: JobPaths
    report: Path | None
    restart: bool


class StopSignal:
    """True once the user wants the run to end. A second signal interrupts at once."""

    def __init__(self) -> None:
        self.stopped = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.stopped

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        print("\nspillway: stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside the context."""
        former = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def run(options: RunOptions) -> int:
    """Run the job to its end, or until the user stops it. Returns the exit status.

    Raises:
        SpillwayError: anything that keeps the job from running, before work is spent.
    """
    with tracing("spillway-run") as traces:
        whole = traces.begin("job", os.environ.get(TRACEPARENT_VARIABLE, ""))
        try:
            status = _run(options, whole)
        except SpillwayError as error:
            whole.end(error=error.message)
            raise
        whole.end({"spillway.exit_status": status, "gen_ai.request.model": options.engine.model})
        return status


def _run(options: RunOptions, whole: OpenSpan) -> int:
    console = Console(stderr=True)
    checkpoint = Checkpoint.open(options.engine.model)
    dtype = chosen_dtype(options.engine.dtype, options.engine.device)
    digest = checkpoint.digest().hex()
    job_options = JobOptions(digest, dtype, options.engine.seed, restart=options.restart)
    checking = whole.child("validate")
    with Job.open(options.paths, job_options) as job:
        counts = job.counts()
        checking.end({"spillway.lines": counts.total, "spillway.resumed": job.resumed})
        if job.sealed:
            console.print(
                f"spillway: already complete: {counts.completed} answered and {counts.failed} refused lines; "
                f"see {job.paths.output}"
            )
            return 0
        state = f"{counts.completed} already done, " if job.resumed else ""
        console.print(
            f"spillway: {counts.total} lines, {state}{counts.failed} refused; loading {options.engine.model} as {dtype}"
        )
        if counts.pending:
            running = whole.child("run")
            status = _run_job(options, checkpoint, digest, dtype, job, console)
            running.end(_outcome(job))
            return status
        job.seal()
        console.print(f"spillway: nothing left to run; wrote {job.paths.output}")
        return 0


def _run_job(options: RunOptions, checkpoint: Checkpoint, digest: str, dtype: str, job: Job, console: Console) -> int:
    before, stop = job.counts(), StopSignal()
    with stop.installed():
        started = time.monotonic()
        config = engine_config(options.engine, checkpoint.spec, dtype, job.paths.directory / KV_FOLDER)
        config = replace(config, private=not (config.disk_kv_bytes and options.engine.disk_dir))
        loaded = load_engine(checkpoint, digest, config)
        load_s = time.monotonic() - started
        console.print(f"spillway: {describe_tiers(loaded, config)}")
        started = time.monotonic()
        try:
            tally = _drive(job, loaded, options.engine.seed, stop)
        finally:
            run_s = time.monotonic() - started
            # What the device holds is worth keeping only where a later run can find it.
            loaded.engine.close(keep=config.disk_kv_bytes > 0 and (options.engine.disk_dir is not None or stop.stopped))
        counts = job.counts()
        if not counts.pending:
            job.seal()
            if options.engine.disk_dir is None:  # blocks nobody asked to keep
                shutil.rmtree(job.paths.directory / KV_FOLDER, ignore_errors=True)
    report = RunReport(
        model=options.engine.model,
        dtype=dtype,
        device=config.device,
        lines=LineCounts(
            counts.total, counts.completed, counts.failed, before.completed + before.failed if job.resumed else 0
        ),
        load_s=load_s,
        run_s=run_s,
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        engine=loaded.engine.stats(),
        block_bytes=loaded.block_bytes,
        command=tuple(sys.argv),
    )
    report.print_summary()
    if options.report is not None:
        report.write(options.report)
    return _say_goodbye(job, console)


def _outcome(job: Job) -> dict[str, Attribute]:
    counts, tokens = job.counts(), job.tokens
    return {
        "spillway.lines_completed": counts.completed,
        "spillway.lines_failed": counts.failed,
        "spillway.lines_pending": counts.pending,
        "gen_ai.usage.input_tokens": tokens.prompt_tokens,
        "gen_ai.usage.output_tokens": tokens.completion_tokens,
    }


def _drive(job: Job, loaded: LoadedModel, seed: int, stop: StopSignal) -> Tally:
    counts = job.counts()
    translator = LineTranslator(loaded.engine.tokenizer, loaded.limits, seed)
    with RunProgress(counts.total, counts.completed + counts.failed) as progress:
        driver = Driver(job, loaded.engine, translator, stop, progress.update)
        driver.run()
    return driver.tally


def _say_goodbye(job: Job, console: Console) -> int:
    counts = job.counts()
    if counts.pending:
        console.print(
            f"spillway: stopped with {counts.pending} of {counts.total} lines left; nothing that was finished is lost. "
            "Run the same command again to go on."
        )
        return EXIT_INTERRUPTED
    console.print(f"spillway: wrote {job.paths.output}" + (f" and {job.paths.errors}" if counts.failed else ""))
    return 0
