"""What a tenant may have and ask for; how long jobs and inputs are kept; what a watcher is told."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from batch_files import request, requests
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st
from service_clients import State, coordinating, refused, serving

from spillway.api.batch.v1 import batch_pb2
from spillway.api.client.batch import BatchClient
from spillway.api.client.target import Target
from spillway.gateway.service import coordinator
from spillway.gateway.service.errors import Reason, ResourceError
from spillway.gateway.service.limits import CallRate, Limits, LimitsFileError, TenantLimits
from spillway.gateway.service.pace import SAMPLE_S, Pace, Sample
from spillway.gateway.service.spec import JobRequest

INPUT = b"\n".join(requests(10))


def run(test: Callable[[Any, Path], Coroutine[Any, Any, None]]) -> Callable[[Any, Path], None]:
    """Runs an async test in a loop of its own."""

    def wrapped(self: Any, tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(self, tmp_path), 120))

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


def limited(**limits: Any) -> Limits:
    return Limits(TenantLimits(**limits))


class TestQuotas:
    @pytest.mark.parametrize(
        ("limits", "reason"),
        [
            ({"jobs": 1}, "QUOTA_JOBS"),
            ({"lines": 19}, "QUOTA_LINES"),
            ({"input_bytes": 2 * len(INPUT) - 1}, "QUOTA_BYTES"),
        ],
    )
    def test_a_quota_is_full_until_something_ends(self, tmp_path: Path, limits: dict[str, int], reason: str) -> None:
        async def test() -> None:
            async with serving(tmp_path, limits=limited(**limits)) as client:
                first = await client.submit(INPUT, request_id="first")
                with refused() as refusal:
                    await client.submit(INPUT)
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
                assert "this would add" in refusal.message
                assert (await client.submit(INPUT, request_id="first")).name == first.name  # that is no new one
                await client.batch.CancelJob(batch_pb2.CancelJobRequest(name=first.name))
                await client.until(first.name)
                if reason == "QUOTA_BYTES":  # inputs count for as long as they are kept
                    with refused():
                        await client.submit(INPUT)
                    await client.batch.DeleteJob(batch_pb2.DeleteJobRequest(name=first.name))
                await client.submit(INPUT)

        asyncio.run(asyncio.wait_for(test(), 60))

    @run
    async def test_tenants_do_not_count_against_each_other(self, tmp_path: Path) -> None:
        limits = Limits(TenantLimits(jobs=1), {"b": TenantLimits(jobs=2)})
        async with coordinating(tmp_path, limits=limits) as service:

            async def submit(tenant: str) -> None:
                upload = service.upload()
                try:
                    upload.write(INPUT)
                    await service.submit(tenant, JobRequest(model="m"), upload)
                finally:
                    upload.close()

            for tenant in "abb":
                await submit(tenant)
            for tenant in "ab":
                with pytest.raises(ResourceError, match=r"1 jobs|2 jobs"):
                    await submit(tenant)


class TestRates:
    @run
    async def test_too_many_calls_are_told_when_to_come_back(self, tmp_path: Path) -> None:
        async with serving(tmp_path, limits=limited(calls_per_second=2.0)) as client:
            calls = [client.batch.ListJobs(batch_pb2.ListJobsRequest()) for _ in range(6)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            errors = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
            assert 1 <= len(errors) <= 2  # two seconds' worth were saved up
            assert errors[0].code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            status = rpc_status.from_call(errors[0])
            info, wait = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            assert status is not None
            assert status.details[0].Unpack(info)
            assert status.details[1].Unpack(wait)
            assert info.reason == "RATE_LIMITED"
            assert 0 < wait.retry_delay.ToMilliseconds() <= 500
            assert not (await client.lease(1, wait_s=0)).lines  # agents are not clients

    @run
    async def test_our_client_waits_as_it_is_told(self, tmp_path: Path) -> None:
        async with (
            serving(tmp_path, limits=limited(calls_per_second=20.0)) as client,
            BatchClient(Target(f"127.0.0.1:{client.port}")) as caller,
        ):
            for _ in range(50):
                assert [job async for job in caller.jobs()] == []

    @given(st.lists(st.floats(0, 2), max_size=80), st.sampled_from([0.5, 2.0, 10.0]))
    @settings(max_examples=80, deadline=None)
    def test_no_more_calls_than_the_rate(self, waits: list[float], rate: float) -> None:
        """In any stretch: what was saved up, and what the rate gives."""
        bucket, now, passed = CallRate(), 0.0, []
        for wait in waits:
            now += wait
            with contextlib.suppress(ResourceError):
                bucket.spend("t", rate, now)
                passed.append(now)
        for first in range(len(passed)):
            for last in range(first, len(passed)):
                most = max(1.0, 2 * rate) + (passed[last] - passed[first]) * rate
                assert last - first + 1 <= most + 1e-6

    def test_waiting_as_told_is_enough(self) -> None:
        bucket, now = CallRate(), 0.0
        for _ in range(6):
            bucket.spend("t", 3.0, now)
        for _ in range(50):
            with pytest.raises(ResourceError) as caught:
                bucket.spend("t", 3.0, now)
            assert caught.value.reason is Reason.RATE_LIMITED
            assert caught.value.retry_s is not None
            now += caught.value.retry_s + 1e-9
            bucket.spend("t", 3.0, now)


class TestLimitsFile:
    def test_what_is_not_said_of_a_tenant_is_the_default(self, tmp_path: Path) -> None:
        path = tmp_path / "limits.toml"
        path.write_text("[default]\njobs = 5\nlines = 100\n[tenant.a]\njobs = 7\nweight = 2\n")
        limits = Limits.load(path)
        assert limits.of("a") == TenantLimits(jobs=7, lines=100, weight=2.0)
        assert limits.of("b") == TenantLimits(jobs=5, lines=100)

    @pytest.mark.parametrize(
        "text",
        ["[default]\njobs = 0", "[default]\nweight = -1", "[default]\nbites = 1", "[tenants.a]", "{", "tenant = 3"],
    )
    def test_what_cannot_be_used_is_said(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "limits.toml"
        path.write_text(text)
        with pytest.raises(LimitsFileError, match=r"limits\.toml cannot be used"):
            Limits.load(path)
        with pytest.raises(LimitsFileError):
            Limits.load(tmp_path / "missing")


class TestKeeping:
    @run
    async def test_equal_inputs_are_stored_once_and_go_with_their_last_job(self, tmp_path: Path) -> None:
        def inodes() -> set[int]:
            return {path.stat().st_ino for path in tmp_path.rglob("input.jsonl")}

        async with serving(tmp_path) as client:
            names = [(await client.submit(INPUT)).name for _ in range(3)]
            assert len(inodes()) == 1
            assert len(list((tmp_path / "inputs").iterdir())) == 1
            await client.submit(INPUT + b"\n")
            assert len(inodes()) == 2
            for name in names:
                await client.batch.CancelJob(batch_pb2.CancelJobRequest(name=name))
                await client.until(name)
            for left, name in zip((2, 2, 1), names, strict=True):
                await client.batch.DeleteJob(batch_pb2.DeleteJobRequest(name=name))
                assert len(list((tmp_path / "inputs").iterdir())) == left
            await client.until((await client.submit(INPUT)).name, State.RUNNING)

    @run
    async def test_an_input_without_a_job_is_swept_away_at_the_start(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as client:
            name = (await client.submit(INPUT)).name
        (tmp_path / "inputs" / "orphan.jsonl").write_bytes(b"x")
        async with serving(tmp_path) as client:
            assert [path.name for path in (tmp_path / "inputs").iterdir()] != ["orphan.jsonl"]
            assert len(list((tmp_path / "inputs").iterdir())) == 1
            await client.until(name, State.RUNNING)
            assert await client.work() == 10

    def test_jobs_that_ended_are_removed_in_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coordinator, "SWEEP_S", 0.0)

        async def test() -> None:
            async with serving(tmp_path, retention_s=0.3) as client:
                running = await client.submit(INPUT)
                ended = await client.submit(request("x"), model="other")
                await client.batch.CancelJob(batch_pb2.CancelJobRequest(name=ended.name))
                with refused() as refusal:
                    while True:
                        await client.get(ended.name)
                        await asyncio.sleep(0.05)
                assert refusal.reason == "JOB_NOT_FOUND"
                await client.until(running.name, State.RUNNING)
                assert await client.work() == 10
            assert not list((tmp_path / "jobs").glob(f"{ended.name[5:]}*"))

        asyncio.run(asyncio.wait_for(test(), 60))


class TestWatching:
    @run
    async def test_tokens_are_counted_and_outlive_a_restart(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as client:
            name = (await client.submit(INPUT)).name
            await client.complete(await client.lease(4))
            job = await client.get(name)
            assert (job.tokens.prompt, job.tokens.completion) == (4, 4)
        async with serving(tmp_path) as client:
            job = await client.until(name, State.RUNNING)
            assert (job.tokens.prompt, job.tokens.completion) == (4, 4)
            await client.work()
            job = await client.until(name)
            assert (job.tokens.prompt, job.tokens.completion, job.tokens.per_second) == (10, 10, 0)
        async with serving(tmp_path) as client:
            assert (await client.get(name)).tokens.completion == 10

    @run
    async def test_why_a_job_waits(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as client:
            name = (await client.until((await client.submit(INPUT)).name, State.RUNNING)).name
            assert "no agent has asked" in (await client.get(name)).waiting_reason
            paused = await client.batch.PauseJob(batch_pb2.PauseJobRequest(name=name))
            assert paused.waiting_reason == "it is paused until somebody resumes it"

    @run
    async def test_many_watchers_see_every_state_and_the_end(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as client:
            name = (await client.submit(INPUT)).name

            async def watch() -> list[batch_pb2.Job]:
                stream = client.batch.WatchJob(batch_pb2.WatchJobRequest(name=name))
                return [message.job async for message in stream]

            watchers = [asyncio.create_task(watch()) for _ in range(40)]
            await client.until(name, State.RUNNING)
            await client.work()
            seen = await asyncio.gather(*watchers)
            assert all(jobs[-1].state == State.COMPLETED for jobs in seen)
            assert all(jobs[-1].lines.completed == 10 for jobs in seen)
            counts = [[job.lines.completed for job in jobs] for jobs in seen]
            assert all(each == sorted(each) for each in counts)


def paced(rates: list[float], seconds: float = SAMPLE_S) -> tuple[Pace, Sample]:
    """A job that went at these rates (lines a second), a sample each; and now."""
    pace, now = Pace(), Sample(0.0, 0, 0)
    for rate in rates:
        pace.note(now)
        now = Sample(now.time_s + seconds, now.lines + round(rate * seconds), now.tokens + round(10 * rate * seconds))
    return pace, now


class TestPace:
    def test_a_steady_job_ends_when_it_must(self) -> None:
        pace, now = paced([100.0] * 40)
        band = pace.end_band_s(now, 10_000)
        assert band is not None
        assert 90 < band[0] < 100 < band[1] < 110
        assert pace.tokens_per_s(now) == pytest.approx(1000)

    def test_an_uneven_job_has_a_wider_band(self) -> None:
        steady, uneven = (paced(rates) for rates in ([100.0] * 40, [10.0, 190.0] * 20))
        widths = []
        for pace, now in (steady, uneven):
            band = pace.end_band_s(now, 10_000)
            assert band is not None
            widths.append(band[1] - band[0])
        assert widths[1] > 3 * widths[0]

    def test_nothing_is_said_without_grounds(self) -> None:
        assert Pace().end_band_s(Sample(1, 5, 5), 10) is None
        pace, now = paced([100.0] * 2)
        assert pace.end_band_s(now, 10) is None
        pace, now = paced([0.0] * 10)
        assert pace.end_band_s(now, 10) is None
        assert pace.tokens_per_s(now) == 0

    def test_the_band_holds_the_truth_nearly_always(self) -> None:
        """Lines that end independently of each other, at a rate that nobody was told."""
        hits = 0
        for seed in range(200):
            dice = random.Random(seed)
            rate = 10 ** dice.uniform(-1, 3)
            pace, lines = Pace(), 0
            for step in range(30):
                pace.note(Sample(step * SAMPLE_S, lines, 0))
                mean = rate * SAMPLE_S
                lines += max(0, round(dice.gauss(mean, mean**0.5))) if mean > 20 else poisson(dice, mean)
            band = pace.end_band_s(Sample(30 * SAMPLE_S, lines, 0), 1000)
            hits += band is not None and band[0] <= 1000 / rate <= band[1]
        assert hits >= 180


def poisson(dice: random.Random, mean: float) -> int:
    count, time = 0, dice.expovariate(1)
    while time < mean:
        count, time = count + 1, time + dice.expovariate(1)
    return count
