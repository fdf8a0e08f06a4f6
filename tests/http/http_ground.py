"""`spillway serve --http` as a process, ways to call it, and a worker that answers what it likes."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import openai

from spillway.api.batch.v1 import batch_pb2_grpc
from spillway.api.worker.v1 import worker_pb2, worker_pb2_grpc

COMMAND = [sys.executable, "-m", "spillway.cli.main"]
TOKENS = {
    "token-of-a": "a client",
    "token-of-b": "b client",
    "token-of-small": "small client",
    "token-of-once": "once client",
    "token-of-slow": "slow client",
    "agent": "cluster agent",
    "monitor": "ops monitor",
}
PATIENCE_S = 240.0


def until(true: Callable[[], Any], what: str) -> Any:
    """Polls until it is true, and returns that; the limit only keeps a defect from hanging the suite."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (value := true()):
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.05)
    return value


def lines(*bodies: dict[str, Any], url: str = "/v1/completions") -> bytes:
    """A batch file with one line a body; custom ids are r0, r1, …; the model is "tiny" if not given."""
    rows = [
        {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {"model": "tiny"} | body}
        for number, body in enumerate(bodies)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def prompts(count: int) -> bytes:
    return lines(*({"prompt": f"say {number}"} for number in range(count)))


@dataclass
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def code(self) -> str:
        """Of an error in OpenAI's shape; checks that it is one."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return str(error["code"])


class _WithToken:
    """A stub whose calls carry a token."""

    def __init__(self, stub: Any, token: str) -> None:
        self._stub, self._token = stub, token

    def __getattr__(self, method: str) -> Any:
        metadata = (("authorization", f"Bearer {self._token}"),)
        return partial(getattr(self._stub, method), metadata=metadata, timeout=60)


class Door:
    """A gateway process. `tokens` has it ask for one of `TOKENS`."""

    def __init__(self, folder: Path, *more: str, tokens: bool = False) -> None:
        self.folder, self.tokens = folder, tokens
        command = [*COMMAND, "serve", "--jobs-dir", str(folder / "jobs"), "--listen", "127.0.0.1:0"]
        if tokens:
            rows = [f"{hashlib.sha256(token.encode()).hexdigest()} {who}" for token, who in TOKENS.items()]
            (folder / "tokens").write_text("\n".join(rows))
            more = (*more, "--tokens", str(folder / "tokens"))
        self.log = folder / f"serve{len(list(folder.glob('serve*.log')))}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--http", "127.0.0.1:0", *more],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        assert self.process.stdout is not None
        self.grpc_port, self.port = (int(self.process.stdout.readline().rpartition(":")[2] or 0) for _ in range(2))
        assert self.port, self.log.read_text()

    def stop(self) -> None:
        assert self.process.stdout is not None
        self.process.terminate()
        self.process.wait(60)
        self.process.stdout.close()

    def client(self, token: str = "token-of-a", **options: Any) -> openai.OpenAI:
        """The official client, to be closed."""
        settings = {"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key": token, "max_retries": 0} | options
        return openai.OpenAI(**settings)

    def call(
        self,
        method: str,
        path: str,
        token: str | None = "token-of-a",
        body: bytes | None = None,
        **headers: str,
    ) -> Answer:
        """One raw call."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    @contextmanager
    def jobs(self, token: str) -> Iterator[Any]:
        """The batch service over gRPC, with a token."""
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            yield _WithToken(batch_pb2_grpc.BatchServiceStub(channel), token)

    def upload(self, content: bytes, token: str = "token-of-a", name: str = "batch.jsonl") -> str:
        with self.client(token) as client:
            return client.files.create(file=(name, content), purpose="batch").id

    def batch(self, content: bytes, token: str = "token-of-a", **more: Any) -> str:
        """Uploads and begins."""
        wanted: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h"} | more
        with self.client(token) as client:
            return client.batches.create(input_file_id=self.upload(content, token), **wanted).id

    def ended(self, batch: str, token: str = "token-of-a") -> Any:
        """The batch once it is over."""
        with self.client(token) as client:

            def over() -> Any:
                found = client.batches.retrieve(batch)
                return found if found.status in ("completed", "failed", "expired", "cancelled") else None

            return until(over, f"{batch} ends")

    def work(self, most: int = 100, *, model: str = "tiny", wait_s: int = 20, status: Any = None) -> int:
        """Leases up to so many lines and answers them; every tenth, by index, fails. Returns how many there were."""
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            worker: Any = worker_pb2_grpc.WorkerServiceStub(channel)
            token = (("authorization", "Bearer agent"),)
            wait = {"seconds": wait_s}
            asked = worker_pb2.LeaseRequest(worker="w", model=model, max_lines=most, wait=wait, status=status)
            leased = worker.Lease(asked, metadata=token, timeout=90)
            if not leased.lines:
                return 0
            results = [
                worker_pb2.CompleteRequest.Result(index=each.index, body=b'{"answer": %d}' % each.index)
                for each in leased.lines
                if each.index % 10
            ]
            failures = [
                worker_pb2.FailRequest.Failure(index=each.index, code="invalid_parameter", message="unlucky")
                for each in leased.lines
                if not each.index % 10
            ]
            job = leased.lines[0].job
            if results:
                complete = worker_pb2.CompleteRequest(job=job, lease=leased.lease, results=results)
                worker.Complete(complete, metadata=token, timeout=60)
            if failures:
                fail = worker_pb2.FailRequest(job=job, lease=leased.lease, failures=failures)
                worker.Fail(fail, metadata=token, timeout=60)
            return len(leased.lines)

    def drain(self, count: int) -> None:
        """Answers exactly so many lines, of whatever jobs there are."""
        while count:
            count -= self.work(count)


@contextmanager
def serving(folder: Path, *more: str, tokens: bool = False) -> Iterator[Door]:
    """A gateway for as long as the block lasts; it must not have met a defect of its own."""
    door = Door(folder, *more, tokens=tokens)
    try:
        yield door
    finally:
        door.stop()
    log = door.log.read_text()
    assert "Traceback" not in log, log
    assert door.process.returncode == 0
