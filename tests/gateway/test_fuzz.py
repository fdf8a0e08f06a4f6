"""Any bytes on any call, and on the socket itself, are refused with a code that blames the caller; nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from batch_files import requests
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service_clients import Client, State, serving

from spillway.api.batch.v1 import batch_pb2
from spillway.api.worker.v1 import worker_pb2

INPUT = b"\n".join([*requests(10), b"{"])
METHODS = {
    f"/{file.package}.{service.name}/{method.name}": method
    for file in (batch_pb2.DESCRIPTOR, worker_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}
BLAME_THE_CALLER = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
}
PATIENCE_S = 0.3
"""Some calls may wait, and are right to."""


class Ground:
    """A gateway in a loop of its own, in a thread; a job that runs, and one that has ended."""

    def __init__(self, data: Path) -> None:
        self.loop, self.ready, self.stopping = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
        self.data = data
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.serve(),))
        self.thread.start()
        assert self.ready.wait(60)

    async def serve(self) -> None:
        async with serving(self.data) as self.client:
            self.running = (await self.client.submit(INPUT)).name
            self.ended = (await self.client.submit(INPUT)).name
            await self.client.batch.CancelJob(batch_pb2.CancelJobRequest(name=self.ended))
            await self.client.until(self.ended)
            await self.client.until(self.running, State.RUNNING)
            self.ready.set()
            await self.stopping.wait()

    def do(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(60)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.stopping.set)
        self.thread.join(60)
        self.loop.close()


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    made = Ground(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.stop()


def values(field: FieldDescriptor, names: list[str]) -> st.SearchStrategy[Any]:
    """Anything that a field can hold, and what it should hold."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type, names)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        plain = st.sampled_from([*names, "m", "", "jobs/", "jobs/" + "0" * 64, "1-2", "internal_error"])
        return st.binary(max_size=40) if field.type == FieldDescriptor.TYPE_BYTES else plain | st.text(max_size=20)
    bits = 31 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_ENUM) else 63
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        return st.floats()
    return st.integers(-3, 3) | st.sampled_from([2**bits - 1, -(2**bits), 2**31 - 1])


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, names: list[str]) -> Any:
    """A message with some of its fields set to anything."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()) or (field.message_type and field.message_type.GetOptions().map_entry):
            continue
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values(field, names), max_size=2)))
        elif field.message_type:
            getattr(message, field.name).CopyFrom(draw(values(field, names)))
        else:
            setattr(message, field.name, draw(values(field, names)))
    return message


@st.composite
def frames(draw: st.DrawFn, method: Any, names: list[str]) -> bytes:
    """A message as bytes: a whole one, one with bytes changed or cut off, or none at all."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=60))
    whole = bytearray(draw(messages(method.input_type, names)).SerializeToString())
    for place, value in draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2)):
        if place < len(whole):
            whole[place] = value
    return bytes(whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole)


async def ended(client: Client, path: str, method: Any, sent: list[bytes]) -> grpc.aio.AioRpcError | None:
    """How a call with these raw frames ends: None if it is answered."""
    kind = {(True, False): "stream_unary", (False, True): "unary_stream", (False, False): "unary_unary"}
    multi: Any = getattr(client.channel, kind[method.client_streaming, method.server_streaming])(path)
    call = multi(iter(sent) if method.client_streaming else sent[0], timeout=PATIENCE_S)
    try:
        if isinstance(call, AsyncIterator) or method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    return None


@given(st.data(), st.sampled_from(sorted(METHODS)))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_frame_on_any_call(ground: Ground, data: st.DataObject, path: str) -> None:
    method = METHODS[path]
    stops = method.name in ("PauseJob", "CancelJob")  # the others are to find one that runs
    names = [ground.ended] if stops else [ground.running, ground.ended]
    sent = data.draw(st.lists(frames(method, names), min_size=1, max_size=3))
    error = ground.do(ended(ground.client, path, method, sent))
    if error is None or (error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and _may_wait(method)):
        return
    assert error.code() in BLAME_THE_CALLER, (path, sent, error)
    status = rpc_status.from_call(error)
    assert status is not None, (path, sent, error)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "spillway.dev"
    assert info.reason


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _may_wait(method: Any) -> bool:
    return method.server_streaming or method.name in ("Lease", "SubmitJob")


@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_bytes_on_the_socket(ground: Ground, sent: list[bytes], polite: bool) -> None:
    """Some of them after the greeting of HTTP/2."""

    async def talk() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", ground.client.port)
        with contextlib.suppress(ConnectionError):
            if polite:
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
            for piece in sent:
                writer.write(piece)
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    ground.do(talk())
    assert ground.do(ground.client.get(ground.running)).lines.total == 11


def test_afterwards_it_works_and_nothing_was_left_behind(ground: Ground) -> None:
    """Runs last: the ground has seen all of the above."""

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    async def nonsense() -> None:
        for path, method in METHODS.items():
            await ended(ground.client, path, method, [b"\xff\xff", b"\n\x03abc"])

    ground.do(nonsense())
    before = ground.do(tasks()), open_files()
    for _ in range(20):
        ground.do(nonsense())
    assert ground.do(tasks()) <= before[0] + 2
    assert open_files() <= before[1] + 2
    assert list((ground.data / "incoming").iterdir()) == []

    async def work() -> bytes:
        name = (await ground.client.submit(INPUT, model="fresh")).name
        while (leased := await ground.client.lease(4, wait_s=5, model="fresh")).lines:
            await ground.client.complete(leased)
            if (await ground.client.get(name)).lines.pending == 0:
                break
        assert (await ground.client.until(name)).state == State.COMPLETED
        return await ground.client.file(name)

    assert ground.do(work()).count(b"\n") == 10


def test_times_that_are_none(ground: Ground) -> None:
    """Seconds and nanoseconds out of range, which protobuf decodes without a word."""
    submit, lease = "/spillway.batch.v1.BatchService/SubmitJob", "/spillway.worker.v1.WorkerService/Lease"
    for seconds, nanos in ((0, -(2**31)), (0, 2**31 - 1), (2**62, 0), (-(2**62), 0)):
        time = {"seconds": seconds, "nanos": nanos}
        submitted = batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m", deadline=time))
        error = ground.do(ended(ground.client, submit, METHODS[submit], [submitted.SerializeToString()]))
        assert error is not None
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        if seconds:
            leased = worker_pb2.LeaseRequest(worker="w", model="m", max_lines=1, wait=time)
            error = ground.do(ended(ground.client, lease, METHODS[lease], [leased.SerializeToString()]))
            assert error is not None
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
