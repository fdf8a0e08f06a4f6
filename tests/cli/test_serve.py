"""`spillway serve` as a process: it says where it serves, keeps strangers out, and stops when told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from commands import refused

from spillway.api.batch.v1 import batch_pb2, batch_pb2_grpc
from spillway.cli.serve import is_loopback

COMMAND = (sys.executable, "-m", "spillway.cli.main", "serve")


def test_it_serves_until_sigterm_and_goes_on_where_it_was(tmp_path: Path) -> None:
    def messages() -> list[batch_pb2.SubmitJobRequest]:
        return [batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"), request_id="r", input=b"{}\n")]

    names = set()
    for _ in range(2):
        with subprocess.Popen(
            [*COMMAND, "--jobs-dir", tmp_path, "--listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as process:
            assert process.stdout is not None
            try:
                port = process.stdout.readline().strip().rpartition(":")[2]
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    stub = batch_pb2_grpc.BatchServiceStub(channel)
                    names.add(stub.SubmitJob(iter(messages()), timeout=60).name)
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert len(names) == 1


def test_other_machines_are_served_only_with_tokens_and_tls(tmp_path: Path) -> None:
    message = refused("serve", "--jobs-dir", str(tmp_path / "jobs"), "--listen", "0.0.0.0:0")
    assert "--insecure" in message
    assert "needs tokens and TLS" in message
    assert not (tmp_path / "jobs").exists()


def test_what_cannot_be_used_is_said_in_a_sentence(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for arguments in (("--tokens", missing), ("--tls-cert", missing), ("--tls-cert", missing, "--tls-key", missing)):
        message = refused("serve", "--jobs-dir", str(tmp_path / "jobs"), "--listen", "127.0.0.1:0", *arguments)
        assert message.startswith("spillway: ") or "\nspillway: " in message


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("gateway:1", False),
        (":1", False),
        ("", False),
    ],
)
def test_what_only_this_machine_reaches(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
