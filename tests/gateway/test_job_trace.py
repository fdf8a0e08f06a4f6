"""One trace a job: below the call that submitted it, told by the gateway as things end, and carried to agents."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from batch_files import requests
from service_clients import Client, State, serving

from spillway.api.batch.v1 import batch_pb2
from spillway.api.tracing import Sampler, Span, SpanContext, Traces
from spillway.api.worker.v1 import worker_pb2
from spillway.gateway.service.job_trace import ALWAYS_TRACED, is_traced
from spillway.gateway.service.leases import LeaseRules

CALLER = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
INPUT = b"\n".join(requests(6))


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def wrapper(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return wrapper


async def submit(client: Client, traceparent: str = CALLER, request_id: str = "") -> str:
    def messages() -> Any:
        yield batch_pb2.SubmitJobRequest(job=batch_pb2.Job(model="m"), input=INPUT, request_id=request_id)

    metadata = (("traceparent", traceparent),) if traceparent else ()
    return str((await client.batch.SubmitJob(messages(), metadata=metadata)).name)


def by_name(spans: list[Span]) -> dict[str, Span]:
    """Where there is one of each name."""
    assert len({span.name for span in spans}) == len(spans), [span.name for span in spans]
    return {span.name: span for span in spans}


@run
async def test_the_trace_of_a_job_hangs_on_the_call_that_submitted_it(tmp_path: Path) -> None:
    spans: list[Span] = []
    async with serving(tmp_path, traces=Traces(spans.append)) as client:
        name = await submit(client)
        leased = await client.lease(6)
        mine = SpanContext(SpanContext.parse(CALLER).trace_id, 7)
        results = [worker_pb2.CompleteRequest.Result(index=line.index, body=b"{}") for line in leased.lines]
        complete = worker_pb2.CompleteRequest(job=name, lease=leased.lease, results=results)
        await client.worker.Complete(complete, metadata=(("traceparent", str(mine)),))
        await client.until(name)
    found = by_name(spans)
    job, lease, result = found["job"], found["lease"], found["result"]
    assert {span.context.trace_id for span in spans} == {mine.trace_id}
    assert job.parent == SpanContext.parse(CALLER)
    assert {found[each].parent for each in ("submit", "validate", "lease", "seal")} == {job.context}
    assert SpanContext.parse(leased.traceparent) == lease.context
    assert result.parent == mine
    assert lease.attributes == {"spillway.lines": 6, "spillway.worker": "w", "spillway.end": "done"}
    assert result.attributes == {"spillway.results": 6, "spillway.accepted": 6}
    assert job.attributes["spillway.job"] == name
    assert (job.attributes["spillway.lines_completed"], job.attributes["spillway.state"]) == (6, "completed")
    assert all(job.start_s <= span.start_s <= span.end_s <= job.end_s for span in spans)


@run
async def test_without_a_caller_a_job_begins_its_own_trace_and_each_job_another(tmp_path: Path) -> None:
    spans: list[Span] = []
    async with serving(tmp_path, traces=Traces(spans.append)) as client:
        for traceparent in ("", "nonsense"):
            name = await submit(client, traceparent)
            await client.until(name, State.RUNNING)
            await client.work()
            await client.until(name)
    jobs = [span for span in spans if span.name == "job"]
    assert [span.parent for span in jobs] == [None, None]
    assert len({span.context.trace_id for span in jobs}) == 2
    results = [span for span in spans if span.name == "result"]
    leases = {span.context for span in spans if span.name == "lease"}
    assert {span.parent for span in results} == leases  # the worker has no spans of its own


@run
async def test_what_is_not_kept_reaches_nobody(tmp_path: Path) -> None:
    spans: list[Span] = []
    async with serving(tmp_path, traces=Traces(spans.append, Sampler(0.0))) as client:
        name = await submit(client, CALLER[:-1] + "0")
        own = await submit(client, "")
        assert (await client.lease(1)).traceparent == ""
        await client.work()
        await client.batch.CancelJob(batch_pb2.CancelJobRequest(name=name))
        await client.batch.CancelJob(batch_pb2.CancelJobRequest(name=own))
        await client.until(name)
        await client.until(own)
    assert spans == []


@run
async def test_a_lost_lease_says_so_and_the_next_is_another_span(tmp_path: Path) -> None:
    spans: list[Span] = []
    async with serving(tmp_path, rules=LeaseRules(ttl_s=1, max_attempts=100), traces=Traces(spans.append)) as client:
        name = await submit(client)
        await client.lease(6)
        await client.until_leased(name, 0)
        await client.work(6)
        await client.until(name)
    lost, *_, done = [span for span in spans if span.name == "lease"]
    assert (lost.error, lost.attributes["spillway.end"]) == ("the lease ran out", "expired")
    assert (done.error, done.attributes["spillway.end"]) == ("", "done")
    assert lost.context != done.context


@run
async def test_a_restarted_gateway_goes_on_with_the_trace_and_tells_of_the_job_once(tmp_path: Path) -> None:
    before, after = list[Span](), list[Span]()
    async with serving(tmp_path, traces=Traces(before.append)) as client:
        name = await submit(client, request_id="once")
        assert await submit(client, CALLER.replace("abcdef-01", "000001-01"), request_id="once") == name
        await client.until(name, State.RUNNING)
    async with serving(tmp_path, traces=Traces(after.append)) as client:
        await client.until(name, State.RUNNING)
        await client.work()
        await client.until(name)
    async with serving(tmp_path, traces=Traces(after.append)) as client:
        await client.get(name)
    assert [span.name for span in before] == ["submit", "validate"]
    (job,) = [span for span in after if span.name == "job"]
    assert job.context == before[0].parent
    assert job.parent == SpanContext.parse(CALLER)
    assert job.start_s == before[0].start_s
    (validate,) = [span for span in after if span.name == "validate"]
    assert validate.attributes["spillway.resumed"] is True


@run
async def test_an_input_that_cannot_be_used_fails_its_trace(tmp_path: Path) -> None:
    spans: list[Span] = []
    async with serving(tmp_path, traces=Traces(spans.append)) as client:
        job = await client.until((await client.submit(b"\n\n")).name)
    found = by_name(spans)
    assert found["job"].error == found["validate"].error == job.error.message


def test_a_million_leases_leave_some_thousand_spans_and_none_of_the_first_is_left_out() -> None:
    assert all(is_traced(number) for number in range(ALWAYS_TRACED))
    traced = [number for number in range(10**6) if is_traced(number)]
    assert 3000 < len(traced) < 3700
    assert max(later - earlier for earlier, later in pairwise(traced)) < 10**6 / 100
