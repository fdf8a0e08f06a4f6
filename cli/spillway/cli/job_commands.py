"""The options of `spillway submit`, `jobs`, `watch`, `results` and `cancel`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from spillway.api.errors import SpillwayError
from spillway.cli.connect import Connection, JobArgument, JsonOption
from spillway.cli.flat import flat

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class UsageError(SpillwayError):
    """An option that cannot be understood."""


@flat
def submit(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="OpenAI Batch file: one JSON request per line. Or a URI that the gateway is allowed to fetch: s3://…",
        ),
    ],
    model: Annotated[str, typer.Option(help="The model deployment that is to run it: the agents' --served-model.")],
    name: Annotated[str, typer.Option(help="For people.")] = "",
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")] = None,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="Lines not done within 90s, 30m, 12h or 2d get the code expired.")
    ] = None,
    request_id: Annotated[
        str, typer.Option(help="Makes a repeated submit the same job. Default: a new one for each call.")
    ] = "",
    wait: Annotated[bool, typer.Option("--watch", help="Watch it until it ends, as `spillway watch` does.")] = False,
    connection: Connection,
    json: JsonOption = False,
) -> None:
    """Submit a batch file to a gateway, and print the name of its job.

    The upload is repeated while the gateway is away (for a minute), and makes one job however often. Status 0:
    accepted, and durable. With --watch, as `spillway watch`.
    """
    from spillway.api.batch.v1 import batch_pb2
    from spillway.cli import job_view, jobs

    wanted = batch_pb2.Job(model=model, display_name=name, labels=_labels(label or []), priority=priority)
    if deadline is not None:
        wanted.deadline.FromMilliseconds(round((time.time() + duration_s(deadline)) * 1000))
    accepted = jobs.submit(connection, wanted, source if "://" in source else Path(source), request_id)
    print(job_view.as_json(accepted) if json else accepted.name, flush=True)
    if wait:
        raise typer.Exit(jobs.watch(connection, accepted.name, json_lines=json))


@flat
def list_jobs(
    *,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    connection: Connection,
    json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    from spillway.cli import jobs

    jobs.show_jobs(connection, limit, json_lines=json)


@flat
def watch(*, job: JobArgument, connection: Connection, json: JsonOption = False) -> None:
    """Watch a job until it ends.

    A bar on a terminal, plain lines elsewhere, a line of JSON per change with --json. Ctrl-C leaves the job running.
    Status 0: completed (single lines may have failed: see the counts). 3: cancelled, expired or failed. 130: Ctrl-C.
    """
    from spillway.cli import jobs

    raise typer.Exit(jobs.watch(connection, job, json_lines=json))


@flat
def results(
    *,
    job: JobArgument,
    output: Annotated[
        Path | None, typer.Option(help="Where to put them, in input order, once the job has ended. Default: stdout.")
    ] = None,
    errors: Annotated[
        Path | None, typer.Option(help="Where failed lines go. Default: OUTPUT with .errors before its ending.")
    ] = None,
    cursor: Annotated[
        Path | None, typer.Option(help="Without --output: a file that remembers which rows were printed.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait until the job has ended.")] = False,
    connection: Connection,
) -> None:
    """Fetch the results of a job.

    With --output, the sealed files of a job that has ended; a broken download goes on where it was. Without, rows as
    lines finish, errors among them, on stdout; with --cursor the next call prints only what is new.

    Status 0: fetched. 3: fetched, of a job that was cancelled, expired or failed. 130: Ctrl-C.
    """
    from spillway.cli import jobs

    if output is not None and cursor is not None:
        raise UsageError("--cursor is for rows on stdout", "Leave out --output or --cursor.")
    files = jobs.ResultFiles(output, errors, cursor, follow)
    raise typer.Exit(jobs.results(connection, job, files))


@flat
def cancel(*, job: JobArgument, connection: Connection, json: JsonOption = False) -> None:
    """Cancel a job: what is done is kept, lines without a result get the code cancelled."""
    _order("CANCEL", job, connection, json)


@flat
def pause(*, job: JobArgument, connection: Connection, json: JsonOption = False) -> None:
    """Hand out no further lines of a job until it is resumed; lines that are running are finished."""
    _order("PAUSE", job, connection, json)


@flat
def resume(*, job: JobArgument, connection: Connection, json: JsonOption = False) -> None:
    """Go on with a paused job."""
    _order("RESUME", job, connection, json)


@flat
def delete(*, job: JobArgument, connection: Connection) -> None:
    """Remove a job that has ended, with its input and its results."""
    from spillway.cli import jobs

    jobs.delete(connection, job)


def _order(what: str, job: str, connection: Connection, json: bool) -> None:
    from spillway.api.client.batch import Order
    from spillway.cli import jobs

    jobs.order(connection, job, Order[what], json_lines=json)


def _labels(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"{pair!r} is no label", "Write it as KEY=VALUE.")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def duration_s(text: str) -> float:
    """Seconds of 90s, 30m, 12h or 2d. Raises UsageError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no length of time", "Write it like 90s, 30m, 12h or 2d.")
    return float(match[1]) * _SECONDS[match[2]]
