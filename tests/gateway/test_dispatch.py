"""Which lines an agent gets: by share, priority and age, and those that begin alike together, whatever their job."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
from batch_files import answer, request
from hypothesis import given, settings
from hypothesis import strategies as st
from service_clients import coordinating

from spillway.api.lines import BatchLine, parse_line
from spillway.gateway.families import LEVELS, beginnings, families, find
from spillway.gateway.order import BOUNDARIES
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.job_trace import Report
from spillway.gateway.service.limits import Limits, TenantLimits
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.spec import JobRequest
from spillway.gateway.service.state import State


async def submit(coordinator: Coordinator, lines: list[bytes], tenant: str = "t", priority: int = 0) -> ServedJob:
    upload = coordinator.upload()
    upload.write(b"\n".join(lines))
    job = await coordinator.submit(tenant, JobRequest(model="m", priority=priority), upload)
    while job.state is State.VALIDATING:
        await job.changed.wait()
    await asyncio.sleep(0.002)  # ids carry milliseconds: this one is older than the next
    return job


async def given_out(coordinator: Coordinator, most: int = 8, worker: str = "w") -> list[list[tuple[str, str]]]:
    """Leases until there is nothing left: (job id, custom_id) of each line, by lease. Each is answered at once."""
    leases = []
    while (grant := await coordinator.lease(worker, "m", most, 0)) is not None:
        leases.append([(grant.job_id, line.custom_id) for line, _ in grant.lines])
        coordinator.complete(
            grant.job_id, [(line.index, answer(line)) for line, _ in grant.lines], Report(grant.lease.id)
        )
    return leases


def documents(job: str, count: int, questions: int, seed: int) -> list[bytes]:
    """Questions about documents, in no order; the same documents for all jobs."""
    texts = [" ".join(random.Random(number).choices(["left", "right", "up", "down"], k=400)) for number in range(count)]
    lines = [
        request(f"{number}/{job}{question}", f"{texts[number]} Question {question} of {job}?")
        for number in range(count)
        for question in range(questions)
    ]
    random.Random(seed).shuffle(lines)
    return lines


def test_jobs_that_share_documents_meet(tmp_path: Path) -> None:
    """All that is asked about a document is asked in one go, whichever of three jobs asks it."""

    async def run() -> None:
        async with coordinating(tmp_path) as coordinator:
            for name in "abc":
                await submit(coordinator, documents(name, 12, 5, ord(name)))
            leases = await given_out(coordinator)
            sequence = [custom_id.split("/")[0] for lease in leases for _, custom_id in lease]
            assert len(sequence) == 12 * 5 * 3
            assert sum(one != other for one, other in itertools.pairwise(sequence)) == 11
            assert all(len({job for job, _ in lease}) == 1 for lease in leases)

    asyncio.run(run())


def test_a_job_alone_gets_whole_leases(tmp_path: Path) -> None:
    async def run() -> None:
        async with coordinating(tmp_path) as coordinator:
            await submit(coordinator, documents("a", 12, 5, 1))
            assert [len(lease) for lease in await given_out(coordinator)] == [8] * 7 + [4]

    asyncio.run(run())


def test_jobs_that_share_nothing_go_one_after_the_other(tmp_path: Path) -> None:
    async def run() -> None:
        async with coordinating(tmp_path) as coordinator:
            jobs = [
                await submit(coordinator, [request(f"{name}{number}", f"{name * 900}{number}") for number in range(20)])
                for name in "xyz"
            ]
            order = [lease[0][0] for lease in await given_out(coordinator)]
            assert order == [job.spec.id for job in jobs for _ in range(3)]

    asyncio.run(run())


def test_priority_beats_likeness(tmp_path: Path) -> None:
    async def run() -> None:
        async with coordinating(tmp_path) as coordinator:
            low = await submit(coordinator, documents("low", 4, 4, 1))
            high = await submit(coordinator, documents("high", 4, 4, 2), priority=1)
            jobs = [job for lease in await given_out(coordinator) for job, _ in lease]
            assert jobs == [high.spec.id] * 16 + [low.spec.id] * 16

    asyncio.run(run())


def test_priority_is_a_matter_within_a_tenant(tmp_path: Path) -> None:
    """Else a tenant could push all others out by asking for the highest."""

    async def run() -> None:
        async with coordinating(tmp_path) as coordinator:
            lines = [request(str(number)) for number in range(40)]
            loud = await submit(coordinator, lines, "loud", 100)
            await submit(coordinator, lines, "quiet", -100)
            jobs = [lease[0][0] for lease in await given_out(coordinator, 2)]
            assert 8 <= Counter(jobs[:20])[loud.spec.id] <= 12

    asyncio.run(run())


def test_shares_by_weight(tmp_path: Path) -> None:
    async def run() -> None:
        limits = Limits(tenants={"big": TenantLimits(weight=3.0)})
        async with coordinating(tmp_path, limits=limits) as coordinator:
            big = await submit(coordinator, [request(str(number)) for number in range(90)], "big")
            await submit(coordinator, [request(str(number)) for number in range(90)], "small")
            jobs = [lease[0][0] for lease in await given_out(coordinator, 2)]
            assert 28 <= Counter(jobs[:40])[big.spec.id] <= 32

    asyncio.run(run())


def test_workers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two agents take turns: each goes on with the documents it has, and every line goes out once."""

    async def run() -> None:
        async with coordinating(tmp_path) as coordinator:
            for name in "ab":
                await submit(coordinator, documents(name, 6, 8, ord(name)))
            seen: list[str] = []
            switches = Counter[str]()
            last: dict[str, str] = {}
            for worker in itertools.cycle(("one", "two")):
                grant = await coordinator.lease(worker, "m", 4, 0)
                if grant is None:
                    break
                for line, _ in grant.lines:
                    document = line.custom_id.split("/")[0]
                    switches[worker] += last.get(worker) != document
                    last[worker] = document
                    seen.append(line.custom_id)
                coordinator.complete(
                    grant.job_id, [(line.index, answer(line)) for line, _ in grant.lines], Report(grant.lease.id)
                )
            assert len(seen) == len(set(seen)) == 96
            assert switches.total() <= 2 * 6

    asyncio.run(run())


prompts = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from([100, 600, 2600, 9000]), st.integers(0, 3)), max_size=25
)


@given(prompts)
@settings(max_examples=60, deadline=None)
def test_families_are_the_lines_that_begin_alike(drawn: list[tuple[str, int, int]]) -> None:
    texts = sorted(f"{letter * length}{tail}" for letter, length, tail in drawn)
    bodies = [parsed.body for text in texts if isinstance(parsed := parse_line(request("x", text), 1), BatchLine)]
    keys = [beginnings(body) for body in bodies]
    for level, boundary in enumerate(BOUNDARIES[each] for each in LEVELS):
        reached = np.array([len(each) > level for each in keys], dtype=bool)
        column = np.array([each[level] if len(each) > level else 0 for each in keys], dtype=np.uint32)
        assert reached.tolist() == [len(text) >= boundary for text in texts]
        table = families(column, reached)
        for text, mine in zip(texts, keys, strict=True):
            if len(mine) > level:
                span = find(table, mine[level])
                assert span is not None
                assert [each[:boundary] == text[:boundary] and len(each) >= boundary for each in texts] == [
                    span[0] <= place < span[1] for place in range(len(texts))
                ]
        assert find(table, 12345) is None
