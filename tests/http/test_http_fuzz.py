"""Whatever is sent, the door answers with a coded error or closes; it meets no defect and keeps no descriptor."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from http_ground import Door, prompts, serving, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATHS = [
    "/v1/files",
    "/v1/files/{file}",
    "/v1/files/{file}/content",
    "/v1/batches",
    "/v1/batches/{batch}",
    "/v1/batches/{batch}/cancel",
    "/v1/models",
    "/v1/models/tiny",
    "/api/overview",
    "/metrics",
    "/healthz",
    "/",
    "/page.js",
]
NAMES = ["Range", "If-Range", "If-Match", "If-Modified-Since", "Content-Type", "Content-Encoding", "Origin", "Host"]
NAMES += ["Idempotency-Key", "Transfer-Encoding", "Content-Length", "Authorization", "Expect", "Upgrade", "X-Other"]
VALUES = [
    "bytes=0-",
    "bytes=-1",
    "multipart/form-data; boundary=b",
    "multipart/form-data",
    "multipart/mixed; boundary=b",
]
VALUES += ["gzip", "chunked", "0", "-1", "5", "Bearer x", "100-continue", "websocket", "application/json", 'W/"a", *']
BODIES = [
    b"",
    b"{",
    b"{}",
    b"[" * 5000,
    b'{"input_file_id": "file-0", "endpoint": "/v1/completions", "completion_window": "24h"}',
    b'{"input_file_id": 5}',
    b"--b\r\nContent-Disposition: form-data; name=file; filename=x\r\n\r\n{}\r\n--b--\r\n",
    b"--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\nbatch\r\n--b\r\n",
    b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx\r\n--c--\r\n--b--\r\n",
    b"--b\r\nContent-Transfer-Encoding: base64\r\n\r\n!!!\r\n--b--\r\n",
    b"--b\r\n" * 50,
]
METHODS = ["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "X-MADE-UP"]
printable = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)
headers = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES) | printable), max_size=4)
suffix = st.sampled_from(["", "?limit=0", "?limit=x&order=up", "?after=file-0", "?purpose=%00", "/", "%00", "/../x"])
body = st.sampled_from(BODIES) | st.binary(max_size=200)
FEW = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """One that has a batch, whose defects show when it is stopped."""
    with serving(tmp_path_factory.mktemp("door")) as door:
        (door.folder / "file").write_text(door.upload(prompts(3)))
        (door.folder / "batch").write_text(door.batch(prompts(3)))
        yield door


def filled(door: Door, path: str) -> str:
    return path.format(file=(door.folder / "file").read_text(), batch=(door.folder / "batch").read_text())


def exchange(door: Door, message: bytes, *, whole: bool = False) -> bytes:
    """Sends it and reads until the gateway closes; what is not a whole request is ended from this side."""
    with socket.create_connection(("127.0.0.1", door.port), timeout=30) as wire:
        received = b""
        with contextlib.suppress(ConnectionError):  # it may close before it has read all
            wire.sendall(message)
            if not whole:
                wire.shutdown(socket.SHUT_WR)
            while piece := wire.recv(65536):
                received += piece
        return received


def statuses(received: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]


@FEW
@given(
    method=st.sampled_from(
        ["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "X-MADE-UP"]
    ),
    path=st.sampled_from(PATHS),
    suffix=suffix,
    headers=headers,
    body=body,
    honest=st.booleans(),
)
def test_odd_requests_get_coded_errors(
    door: Door, method: str, path: str, suffix: str, headers: list[tuple[str, str]], body: bytes, honest: bool
) -> None:
    target = filled(door, path) + suffix
    if method == "DELETE":
        target = target.replace((door.folder / "file").read_text(), "file-0")  # others want it
    rows = [f"{method} {target} HTTP/1.1", "Connection: close"]
    rows += [f"{name}: {value}" for name, value in headers]
    if "Host" not in dict(headers):
        rows.append("Host: localhost")
    if honest:
        rows.append(f"Content-Length: {len(body)}")
    whole = honest and not {name for name, _ in headers} & {"Content-Length", "Transfer-Encoding", "Expect"}
    received = exchange(door, "\r\n".join(rows).encode("latin-1") + b"\r\n\r\n" + body, whole=whole)
    assert statuses(received) or not whole
    assert all(status < 500 for status in statuses(received)), received


@FEW
@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda noise: b"POST /v1/files HTTP/1.1\r\n" + noise))
def test_noise_is_answered_as_such_or_not_at_all(door: Door, noise: bytes) -> None:
    assert all(status < 500 for status in statuses(exchange(door, noise)))


@FEW
@given(
    st.text(max_size=40), st.sampled_from(["/v1/files/{}", "/v1/batches/{}", "/v1/files/{}/content", "/v1/models/{}"])
)
def test_no_name_leads_out_of_the_house(door: Door, name: str, path: str) -> None:
    for written in (quote(name, safe=""), "..%2f..%2f" + quote(name), "file-" + quote(name, safe=""), "%2e%2e"):
        answer = door.call("GET", path.format(written), None)
        assert answer.status in (400, 404, 405, 200), answer
        if answer.status == 200:  # a name may lead back to a list, never to a file of the machine
            assert answer.json["object"] in ("list", "file", "batch")


def test_clients_that_leave_in_the_middle_cost_nothing(door: Door) -> None:
    descriptors = Path(f"/proc/{door.process.pid}/fd")
    incoming = door.folder / "jobs" / "incoming"

    def leave(times: int) -> None:
        for _ in range(times):
            with socket.create_connection(("127.0.0.1", door.port), timeout=30) as wire:
                head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n"
                wire.sendall(head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
                wire.sendall(b"--b\r\nContent-Disposition: form-data; name=file; filename=x\r\n\r\n" + b"x" * 5000)
            with socket.create_connection(("127.0.0.1", door.port), timeout=30) as wire:
                wire.sendall(
                    f"GET {filled(door, '/v1/files/{file}/content')} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
                )
        until(lambda: not any(incoming.iterdir()), "nothing is left of the uploads")

    leave(3)
    until(lambda: sockets(descriptors) == 0, "connections are closed")
    before = len(list(descriptors.iterdir()))
    leave(30)
    until(lambda: len(list(descriptors.iterdir())) <= before + 3, "descriptors are given back")


def test_an_upload_takes_no_memory(door: Door) -> None:
    """128 MiB in, and out again."""
    piece, pieces = b"x" * (1 << 20), 128
    status = Path(f"/proc/{door.process.pid}/status")

    def peak_kib() -> int:
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])

    head = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head += b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    tail = b"\r\n--b--\r\n"
    door.upload(prompts(1))
    before = peak_kib()
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=60)
    with contextlib.closing(connection):
        body = itertools.chain([head], itertools.repeat(piece, pieces), [tail])
        length = str(len(head) + len(tail) + pieces * len(piece))
        told = {"Content-Length": length, "Content-Type": "multipart/form-data; boundary=b"}
        connection.request("POST", "/v1/files", body, told)
        made = json.loads(connection.getresponse().read())
        assert made["bytes"] == pieces * len(piece)
        connection.request("GET", f"/v1/files/{made['id']}/content")
        answer = connection.getresponse()
        size = 0
        while got := answer.read(1 << 20):
            size += len(got)
        assert size == made["bytes"]
    assert peak_kib() - before < 48 << 10
    door.call("DELETE", f"/v1/files/{made['id']}", None)


def sockets(descriptors: Path) -> int:
    """Connections of clients: what is not listening, and not asyncio's own pair."""
    tables = [Path(f"/proc/{descriptors.parent.name}/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
    established = {row.split()[9] for table in tables for row in table[1:] if row.split()[3] == "01"}
    links = []
    for link in descriptors.iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(link.readlink()))
    return sum(link.removeprefix("socket:[").removesuffix("]") in established for link in links)
