"""BatchJobs on a real API server beside a real gateway: one job each, whatever dies, and cancelled on delete."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from kube import Kube, ours, said
from operated import GatewayProcess, lines
from testcluster import programs

from spillway.api.client.errors import RefusedError
from spillway.api.client.target import Target
from spillway.operator import gateway as calls
from spillway.operator.batch_jobs import BatchJobs
from spillway.operator.cluster import Cluster
from spillway.operator.errors import ClusterError, GatewayError
from spillway.operator.gateway import Gateway
from spillway.operator.names import FINALIZER

PAGE = Path(__file__).parents[2] / "docs" / "kubernetes.md"


class KilledError(Exception):
    """The operator's end."""


class Death:
    """Comes at the n-th change that is made to the world, before it or after it."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.left, self.after = at, after

    async def meets(self, change: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            change.close()
            raise KilledError
        made = await change
        if self.left == 0:
            raise KilledError
        return made


class MortalCluster(Cluster):
    def __init__(self, death: Death) -> None:
        super().__init__()
        self._death = death

    async def _call(self, method: str, path: str, *rest: Any, **more: Any) -> dict[str, Any]:
        call = super()._call(method, path, *rest, **more)
        return await (call if method == "GET" else self._death.meets(call))


class MortalGateway(Gateway):
    def __init__(self, target: Target, death: Death) -> None:
        super().__init__(target)
        self._death = death

    async def submit(self, *arguments: Any) -> Any:
        return await self._death.meets(super().submit(*arguments))

    async def order(self, *arguments: Any) -> Any:
        return await self._death.meets(super().order(*arguments))


class Desk:
    """One BatchJob, looked at by operators that were just started."""

    def __init__(self, kube: Kube, space: str, gateway: GatewayProcess) -> None:
        self.kube, self.space, self.gateway = kube, space, gateway
        self.model = f"m-{space}"
        self.now_s = 1_800_000_000.0

    def make(self, count: int = 3, **spec: Any) -> str:
        """Its UID."""
        spec = {"model": self.model, "input": {"inline": lines(count)}} | spec
        uid: str = self.kube.create(ours("BatchJob", "b", **spec), self.space)["metadata"]["uid"]
        return uid

    def look(self, death: Death | None = None) -> tuple[float | None, int]:
        """Its wake time, and how much it wrote."""

        async def once() -> tuple[float | None, int]:
            fate = death or Death(0, after=False)
            target = Target(self.gateway.address)
            async with MortalCluster(fate) as cluster, MortalGateway(target, fate) as gateway:
                wake_s = await BatchJobs(cluster, gateway).reconcile(self.space, "b", self.now_s)
                return wake_s, cluster.writes

        return asyncio.run(once())

    def until(self, state: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            self.look()
            found = self.job()
            return found if found.get("status", {}).get("state") == state else None

        found: dict[str, Any] = self.kube.wait(reached, f"the BatchJob is {state}")
        return found

    def job(self) -> dict[str, Any]:
        return self.kube.get("BatchJob", "b", self.space)

    def message(self) -> str:
        message: str = said(self.job(), "Complete").get("message", "")
        return message

    def is_gone(self) -> bool:
        return self.kube.find("BatchJob", "b", self.space) is None


@pytest.fixture
def desk(kube: Kube, space: str, gateway: GatewayProcess) -> Desk:
    return Desk(kube, space, gateway)


def test_from_lines_to_results(desk: Desk) -> None:
    uid = desk.make(3, priority=5)
    running = desk.until("Running")
    (job,) = desk.gateway.of(uid)
    assert (running["status"]["job"], job.priority, job.display_name) == (job.name, 5, "b")
    assert running["metadata"]["finalizers"] == [FINALIZER]
    assert running["status"]["progress"] == "0/3"
    assert desk.gateway.answer(desk.model, 2) == 2
    assert desk.until("Running")["status"]["lines"]["completed"] == 2
    assert desk.gateway.answer(desk.model, 2) == 1
    desk.until("Completed")
    desk.look()
    done = desk.job()
    assert "finalizers" not in done["metadata"], "nothing is left to cancel"
    assert done["status"]["progress"] == "3/3"
    assert "completionTime" in done["status"]
    assert said(done, "Complete")["status"] == "True"
    assert desk.look() == (None, 0)


def test_bad_lines_are_counted_by_code(desk: Desk) -> None:
    desk.make(input={"inline": lines(1) + "no line\n"})
    desk.until("Running")
    assert desk.gateway.answer(desk.model, 9) == 1
    done = desk.until("Completed")
    assert (done["status"]["lines"]["completed"], done["status"]["lines"]["failed"]) == (1, 1)
    assert sum(done["status"]["lines"]["failedByCode"].values()) == 1


@pytest.mark.parametrize("field", ["data", "binaryData"])
def test_lines_in_a_config_map_that_comes_later(desk: Desk, field: str) -> None:
    desk.make(input={"configMap": {"name": "input"}})
    assert desk.look()[0] == desk.now_s + 10
    assert desk.message() == "the ConfigMap input does not exist, or has no key batch.jsonl"
    assert desk.look() == (desk.now_s + 10, 0), "saying it again writes nothing"
    content = lines(2) if field == "data" else base64.b64encode(lines(2).encode()).decode()
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "input"}}
    desk.kube.create(manifest | {field: {"batch.jsonl": content}}, desk.space)
    assert desk.until("Running")["status"]["lines"]["total"] == 2


def test_lines_that_the_gateway_fetches_once_they_are_there(desk: Desk) -> None:
    file = desk.gateway.inputs / f"{desk.space}.jsonl"
    desk.make(input={"uri": f"file://{file}"})
    assert desk.look()[0] == desk.now_s + 10
    assert desk.message() == "the gateway finds no file at input.uri"
    assert (said(desk.job(), "GatewayReady")["status"], said(desk.job(), "Submitted")["reason"]) == (
        "True",
        "InputMissing",
    )
    file.write_text(lines(4))
    assert desk.until("Running")["status"]["lines"]["total"] == 4


def test_a_place_that_the_gateway_does_not_allow_is_told(desk: Desk) -> None:
    desk.make(input={"uri": "file:///etc/passwd"})
    with pytest.raises(GatewayError, match="this gateway fetches no inputs from there"):
        desk.look()
    submitted = said(desk.job(), "Submitted")
    assert (submitted["status"], submitted["reason"]) == ("False", "Forbidden")
    assert f"Allowed: file://{desk.gateway.inputs}" in submitted["message"]


@pytest.mark.parametrize(
    ("reason", "is_submit", "told"),
    [
        ("QUOTA_JOBS", True, ("Submitted", "QuotaJobs", False)),
        ("INVALID_ARGUMENT", True, ("Submitted", "InvalidArgument", True)),
        ("UNAUTHENTICATED", True, ("GatewayReady", "Unauthenticated", False)),
        ("RATE_LIMITED", False, ("GatewayReady", "RateLimited", False)),
        ("", True, ("Submitted", "Refused", False)),
    ],
)
def test_a_refusal_is_told_of_what_it_is_about(reason: str, is_submit: bool, told: tuple[str, str, bool]) -> None:
    refusal = RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, "no", "Wait.")
    trouble = calls.refused(refusal, is_submit=is_submit)
    assert (trouble.type, trouble.reason, trouble.is_final) == told
    assert trouble.message == f"the gateway refuses: {refusal}"


def test_without_an_operator_the_page_says_how_to_let_go(desk: Desk, kube: Kube) -> None:
    desk.make()
    desk.until("Running")
    kube.delete("BatchJob", "b", desk.space)
    assert not desk.is_gone()
    (block,) = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    path = f"{programs.ensure(programs.CONTROL_PLANE)}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"KUBECONFIG": str(kube.plane.kubeconfig), "PATH": path}
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], env=environment, check=True, timeout=60)
    assert desk.is_gone()


def test_paused_and_resumed(desk: Desk) -> None:
    uid = desk.make(paused=True)
    desk.until("Paused")
    desk.kube.patch("BatchJob", "b", desk.space, {"spec": {"paused": False}})
    desk.until("Running")
    desk.kube.patch("BatchJob", "b", desk.space, {"spec": {"paused": True}})
    desk.until("Paused")
    assert len(desk.gateway.of(uid)) == 1


def test_why_it_waits_is_told(desk: Desk) -> None:
    desk.make()
    desk.until("Running")
    assert f"there is no ModelDeployment {desk.model}" in desk.message()
    desk.kube.create(ours("ModelDeployment", desk.model, model="/models/m"), desk.space)
    because = {
        "type": "Ready",
        "status": "False",
        "reason": "NotReady",
        "message": "0 of 1 groups are ready; an agent…",
    }
    status = {"conditions": [because | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]}
    desk.kube.patch("ModelDeployment", desk.model, desk.space, {"status": status}, "/status")
    desk.look()
    assert desk.message().endswith(f"ModelDeployment {desk.model}: 0 of 1 groups are ready; an agent…")


def test_deleted_it_is_cancelled(desk: Desk) -> None:
    uid = desk.make()
    desk.until("Running")
    desk.kube.delete("BatchJob", "b", desk.space)
    assert not desk.is_gone()
    desk.look()
    assert desk.is_gone()
    (job,) = desk.gateway.of(uid)
    desk.kube.wait(lambda: desk.gateway.of(uid)[0].state == job.CANCELLED, "the job is cancelled")


def test_a_job_that_is_gone_is_not_run_again(desk: Desk) -> None:
    uid = desk.make()
    name = desk.until("Running")["status"]["job"]
    desk.gateway.cancel(name)
    desk.kube.wait(lambda: desk.gateway.of(uid)[0].HasField("end_time"), "the job has ended")
    desk.gateway.delete(name)
    assert "make another BatchJob" in (desk.until("Failed") and desk.message())
    desk.look()
    assert desk.gateway.of(uid) == []
    assert "finalizers" not in desk.job()["metadata"]


@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again_it_makes_one_job_and_cancels_it(desk: Desk, seed: int) -> None:
    chance = random.Random(seed)
    uid = desk.make(paused=chance.random() < 0.5)
    for _ in range(12):
        with contextlib.suppress(KilledError, ClusterError):
            desk.look(Death(chance.randint(1, 3), after=chance.random() < 0.5))
        assert len(desk.gateway.of(uid)) <= 1
        if chance.random() < 0.3 and not desk.is_gone():
            desk.kube.patch("BatchJob", "b", desk.space, {"spec": {"paused": chance.random() < 0.5}})
        if chance.random() < 0.1:
            desk.kube.delete("BatchJob", "b", desk.space)
    desk.kube.delete("BatchJob", "b", desk.space)
    desk.kube.wait(lambda: desk.look() and desk.is_gone(), "the BatchJob is gone")
    assert len(desk.gateway.of(uid)) <= 1
    desk.kube.wait(lambda: all(job.HasField("end_time") for job in desk.gateway.of(uid)), "its job is cancelled")


@pytest.fixture
def shaken(gateway: GatewayProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[GatewayProcess]:
    monkeypatch.setattr(calls, "CALL_S", 0.5)
    yield gateway
    gateway.thaw()


def test_a_frozen_gateway_holds_nobody_up(desk: Desk, shaken: GatewayProcess) -> None:
    desk.make()
    desk.until("Running")
    shaken.freeze()
    with pytest.raises(GatewayError, match="does not answer"):
        desk.look()
    assert said(desk.job(), "GatewayReady")["status"] == "False"
    shaken.thaw()
    desk.until("Running")
    assert said(desk.job(), "GatewayReady")["status"] == "True"


def test_a_gateway_that_is_away_is_asked_again(desk: Desk, gateway: GatewayProcess) -> None:
    uid = desk.make()
    desk.until("Running")
    gateway.kill()
    try:
        with pytest.raises(GatewayError):
            desk.look()
        told = desk.job()
        assert told["status"]["state"] == "Running"
        assert desk.message().endswith("does not answer; it is asked again")
        with pytest.raises(GatewayError):
            desk.look()
        assert desk.job()["metadata"]["resourceVersion"] == told["metadata"]["resourceVersion"], "told once"
        desk.kube.delete("BatchJob", "b", desk.space)
        with pytest.raises(GatewayError):
            desk.look()
        assert not desk.is_gone(), "its job would go on"
    finally:
        gateway.start()
    desk.look()
    assert desk.is_gone()
    desk.kube.wait(lambda: desk.gateway.of(uid)[0].HasField("end_time"), "the job is cancelled")
