"""The commands about jobs against a real gateway, with a worker that answers what it likes.

Commands run in this process through the same `main` as the installed script; those that are interrupted or outlive a
gateway are processes of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest
from batches import completion, write_lines

from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc
from spillway.cli.main import main

COMMAND = [sys.executable, "-m", "spillway.cli.main"]
NUM_LINES = 30
BODY = b'{"answer": %d, "usage": {"prompt_tokens": 5, "completion_tokens": 7}}'


class Ground:
    """A gateway that asks for tokens, and the way to call it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        rows = [f"{hashlib.sha256(kind.encode()).hexdigest()} default {kind}" for kind in ("client", "agent")]
        (folder / "tokens").write_text("\n".join(rows))
        (folder / "token").write_text("client\n")
        config = folder / "config" / "spillway"
        config.mkdir(parents=True)
        (config / "client.toml").write_text(f'gateway = "{self.address}"\ntoken_file = "{folder / "token"}"\n')
        self.environment = {"XDG_CONFIG_HOME": str(folder / "config"), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
        self.start()

    def start(self) -> None:
        command = [*COMMAND, "serve", "--jobs-dir", str(self.folder / "jobs"), "--listen", self.address]
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen([*command, "--tokens", str(self.folder / "tokens")], stdout=log, stderr=log)

    def kill(self) -> None:
        self.server.kill()
        self.server.wait()

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        command = [*COMMAND, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def call(self, *arguments: str, status: int = 0) -> str:
        """Runs a command to its end: what it printed, or what it complained about."""
        output, message = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment),
            mock.patch.object(sys, "argv", ["spillway", *arguments]),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(message),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        assert (ended.value.code or 0) == status, message.getvalue()
        output.seek(0)
        return output.read() if status in (0, 3) else message.getvalue()

    def work(self, lines: int) -> None:
        """Answers so many lines; fails every tenth."""
        with grpc.insecure_channel(self.address) as channel:
            worker: Any = worker_pb2_grpc.WorkerServiceStub(channel)
            token = (("authorization", "Bearer agent"),)
            asked = worker_pb2.LeaseRequest(worker="w", model="tiny", max_lines=lines, wait={"seconds": 50})
            lease = worker.Lease(asked, metadata=token, timeout=90, wait_for_ready=True)
            assert len(lease.lines) == lines
            good = [each for each in lease.lines if each.index % 10]
            results = [worker_pb2.CompleteRequest.Result(index=each.index, body=BODY % each.index) for each in good]
            failures = [
                worker_pb2.FailRequest.Failure(index=each.index, code="internal_error", message="no")
                for each in lease.lines
                if not each.index % 10
            ]
            job = lease.lines[0].job
            worker.Complete(
                worker_pb2.CompleteRequest(job=job, lease=lease.lease, results=results), metadata=token, timeout=60
            )
            if failures:
                worker.Fail(
                    worker_pb2.FailRequest(job=job, lease=lease.lease, failures=failures), metadata=token, timeout=60
                )


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    made = Ground(tmp_path_factory.mktemp("ground"))
    yield made
    made.kill()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [completion(f"r{each}", f"say {each}") for each in range(NUM_LINES)])


def submit(ground: Ground, source: Path, *more: str) -> str:
    return ground.call("submit", str(source), "--model", "tiny", *more).strip()


def numbers(rows: str) -> list[int]:
    return sorted(int(json.loads(row)["custom_id"][1:]) for row in rows.splitlines())


def test_from_submit_to_files(ground: Ground, source: Path, tmp_path: Path) -> None:
    name = submit(ground, source, "--name", "first", "--label", "team=a", "--request-id", "one")
    assert submit(ground, source, "--name", "first", "--label", "team=a", "--request-id", "one") == name
    watching = ground.popen("watch", name, "--json")
    ground.work(NUM_LINES)
    seen, message = watching.communicate(timeout=240)
    assert watching.returncode == 0, message
    last = json.loads(seen.splitlines()[-1])
    assert (last["state"], last["lines"]["completed"], last["lines"]["failed"]) == ("COMPLETED", "27", "3")
    assert last["labels"] == {"team": "a"}
    output = tmp_path / "out.jsonl"
    ground.call("results", name, "--output", str(output))
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    assert [row["response"]["body"]["answer"] for row in rows] == [each for each in range(NUM_LINES) if each % 10]
    assert numbers((tmp_path / "out.errors.jsonl").read_text()) == [0, 10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.errors.jsonl", "out.jsonl"]
    listed = ground.call("jobs")
    assert name in listed
    assert "completed" in listed


def test_a_broken_download_goes_on_where_it_was(ground: Ground, source: Path, tmp_path: Path) -> None:
    name = submit(ground, source)
    ground.work(NUM_LINES)
    ground.call("watch", name)
    ground.call("results", name, "--output", str(tmp_path / "whole"))
    whole = (tmp_path / "whole").read_bytes()
    part = tmp_path / f".again.{name.removeprefix('jobs/')}.part"
    part.write_bytes(b"#" * 100)  # what is there is kept: only the rest is fetched
    ground.call("results", name, "--output", str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == b"#" * 100 + whole[100:]


def test_rows_come_while_it_runs_and_each_once(ground: Ground, source: Path, tmp_path: Path) -> None:
    name, cursor = submit(ground, source), str(tmp_path / "cursor")
    refused = ground.call("results", name, "--output", str(tmp_path / "out"), status=1)
    assert "--follow" in refused
    ground.work(9)
    first = ""
    while len(first.splitlines()) < 9:  # durable a moment later
        first += ground.call("results", name, "--cursor", cursor)
    following = ground.popen("results", name, "--cursor", cursor, "--follow")
    ground.kill()
    ground.start()
    ground.work(NUM_LINES - 9)
    rest, message = following.communicate(timeout=240)
    assert following.returncode == 0, message
    assert numbers(first + rest) == list(range(NUM_LINES))
    assert ground.call("results", name, "--cursor", cursor) == ""


def test_ctrl_c_of_watch_leaves_the_job_and_says_how_to_come_back(ground: Ground, source: Path) -> None:
    name = submit(ground, source)
    watching = ground.popen("watch", name)
    assert watching.stderr is not None
    first = watching.stderr.readline()
    assert name in first
    watching.send_signal(signal.SIGINT)
    _, message = watching.communicate(timeout=120)
    assert watching.returncode == 130
    assert f"spillway watch {name}" in message
    assert ground.call("cancel", name.removeprefix("jobs/")).split()[0] == name
    ended = ground.popen("watch", name)
    _, message = ended.communicate(timeout=120)
    assert ended.returncode == 3
    assert f"cancelled {NUM_LINES}" in message


def test_pause_resume_and_delete(ground: Ground, source: Path) -> None:
    name = submit(ground, source)
    assert ground.call("pause", name).split() == [name, "paused"]
    assert json.loads(ground.call("pause", name, "--json"))["waiting_reason"].startswith("it is paused")
    refused = ground.call("delete", name, status=1)
    assert "is paused" in refused
    assert "Cancel it first" in refused
    assert ground.call("resume", name).split() == [name, "running"]
    ground.work(NUM_LINES)
    ground.call("watch", name)
    assert ground.call("delete", name) == f"{name} deleted\n"
    assert "there is no job" in ground.call("delete", name, status=1)
    assert "about to be" not in ground.call("jobs")


def test_tokens_are_shown(ground: Ground, source: Path) -> None:
    name = submit(ground, source)
    ground.work(NUM_LINES)
    watched = [json.loads(line) for line in ground.call("watch", name, "--json").splitlines()]
    assert watched[-1]["tokens"]["completion"] == str(7 * 27)
    (row,) = (line for line in ground.call("jobs").splitlines() if name in line)
    assert str((5 + 7) * 27) in row.split()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["watch", "jobs/00"], "there is no job"),
        (["watch", "no/job"], "jobs/"),
        (["submit", "/nowhere", "--model", "m"], "cannot be read"),
        (["submit", "{source}", "--model", "m", "--deadline", "soon"], "30m"),
        (["submit", "{source}", "--model", "m", "--label", "x"], "KEY=VALUE"),
        (["jobs", "--token-file", "/nowhere"], "cannot be read"),
        (["jobs", "--token-file", "{source}"], "token"),
    ],
)
def test_what_is_wrong_is_said(ground: Ground, source: Path, arguments: list[str], expected: str) -> None:
    assert expected in ground.call(*(each.format(source=source) for each in arguments), status=1)
