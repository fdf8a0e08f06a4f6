"""What the commands about jobs do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from spillway.api.batch.v1 import batch_pb2
from spillway.api.client.batch import BatchClient, Order
from spillway.api.client.errors import ClientError
from spillway.api.tracing import TRACEPARENT_VARIABLE
from spillway.cli.connect import Connection, job_name, target
from spillway.cli.job_view import Watching, as_json, is_final, print_table, state, summary
from spillway.gateway.paths import errors_beside

EXIT_NOT_COMPLETED = 3
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class ResultFiles:
    """Where results go. Without `output`, rows go to stdout as they come; `cursor` remembers how far they went."""

    output: Path | None
    errors: Path | None
    cursor: Path | None
    follow: bool


def submit(connection: Connection, job: batch_pb2.Job, source: Path | str, request_id: str) -> batch_pb2.Job:
    """Uploads a job, or has the gateway fetch its input from a URI; the job as it was accepted."""

    async def call() -> batch_pb2.Job:
        async with BatchClient(target(connection)) as client:
            return await client.submit(job, source, request_id, os.environ.get(TRACEPARENT_VARIABLE, ""))

    return asyncio.run(call())


def show_jobs(connection: Connection, limit: int, *, json_lines: bool) -> None:
    """Lists jobs, newest first."""

    async def call() -> list[batch_pb2.Job]:
        found: list[batch_pb2.Job] = []
        async with BatchClient(target(connection)) as client:
            async for job in client.jobs():
                found.append(job)
                if len(found) == limit:
                    break
        return found

    jobs = asyncio.run(call())
    if not json_lines:
        print_table(jobs)
        return
    for job in jobs:
        print(as_json(job))


def watch(connection: Connection, job: str, *, json_lines: bool) -> int:
    """Shows a job until it ends; the exit status. Interrupted, it says how to come back."""
    name = job_name(job)

    async def call() -> batch_pb2.Job:
        last = batch_pb2.Job()
        async with BatchClient(target(connection)) as client:
            with contextlib.nullcontext() if json_lines else Watching() as shown:
                async for last in client.watch(name):
                    if shown is None:
                        print(as_json(last), flush=True)
                    else:
                        shown.show(last)
        return last

    try:
        last = asyncio.run(call())
    except KeyboardInterrupt:
        print(f"spillway: {name} goes on; come back with: spillway watch {name}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if not json_lines:
        print(f"spillway: {name} {summary(last)}", file=sys.stderr)
        if last.lines.completed or last.lines.failed:
            print(f"spillway: fetch results with: spillway results {name} --output FILE", file=sys.stderr)
    return 0 if last.state == batch_pb2.Job.COMPLETED else EXIT_NOT_COMPLETED


def order(connection: Connection, job: str, what: Order, *, json_lines: bool) -> None:
    """Cancels, pauses or resumes a job."""

    async def call() -> batch_pb2.Job:
        async with BatchClient(target(connection)) as client:
            return await client.order(job_name(job), what)

    changed = asyncio.run(call())
    print(as_json(changed) if json_lines else f"{changed.name} {state(changed)}")


def delete(connection: Connection, job: str) -> None:
    """Removes a job."""

    async def call() -> None:
        async with BatchClient(target(connection)) as client:
            await client.delete(job_name(job))

    asyncio.run(call())
    print(f"{job_name(job)} deleted")


def results(connection: Connection, job: str, files: ResultFiles) -> int:
    """Fetches results; the exit status. Interrupted, the same command goes on where it was."""
    name = job_name(job)
    try:
        return asyncio.run(_results(connection, name, files))
    except KeyboardInterrupt:
        print("spillway: interrupted; the same command goes on where it was", file=sys.stderr)
        return EXIT_INTERRUPTED


async def _results(connection: Connection, name: str, files: ResultFiles) -> int:
    async with BatchClient(target(connection)) as client:
        if files.output is None:
            await _print_rows(client, name, files)
            return 0
        job = await client.get(name)
        if not is_final(job):
            if not files.follow:
                raise ClientError(f"{name} is {state(job)}", "Add --follow to wait; or leave out --output to see rows.")
            async for seen in client.watch(name):
                job = seen
        errors = files.errors or errors_beside(files.output)
        await _fetch(client, name, batch_pb2.ReadFileRequest.OUTPUT, files.output)
        if job.lines.failed:
            await _fetch(client, name, batch_pb2.ReadFileRequest.ERRORS, errors)
        written = f"{files.output} and {errors}" if job.lines.failed else f"{files.output}"
        print(f"spillway: wrote {written}", file=sys.stderr)
    return 0 if job.state == batch_pb2.Job.COMPLETED else EXIT_NOT_COMPLETED


async def _print_rows(client: BatchClient, name: str, files: ResultFiles) -> None:
    """Rows to stdout, errors among them; the cursor is kept once what it stands for was written."""
    cursor = _load_cursor(files.cursor, name)
    async for message in client.results(name, cursor, follow=files.follow):
        sys.stdout.buffer.write(message.rows)
        sys.stdout.buffer.flush()
        if files.cursor is not None:
            _replace(files.cursor, f"{name} {message.cursor}\n")


def _load_cursor(path: Path | None, name: str) -> str:
    try:
        known, _, cursor = ("" if path is None else path.read_text()).strip().partition(" ")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ClientError(f"{path} cannot be read: {error}") from error
    if known not in ("", name):
        raise ClientError(f"{path} is a cursor of {known}", "Keep one cursor file for each job.")
    return cursor


def _replace(path: Path, text: str) -> None:
    try:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)
    except (OSError, ValueError) as error:  # the latter: a path without a name
        raise ClientError(f"{path} cannot be written: {error}") from error


async def _fetch(client: BatchClient, name: str, file: batch_pb2.ReadFileRequest.File.ValueType, path: Path) -> None:
    """Downloads a sealed file, complete or not at all; a broken download goes on where it was. Raises ClientError."""
    part = path.with_name(f".{path.name}.{name.removeprefix('jobs/')}.part")
    try:
        with part.open("ab") as out:
            async for data in client.download(name, file, out.tell()):
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    except OSError as error:
        raise ClientError(f"{path} cannot be written: {error.strerror}") from error
