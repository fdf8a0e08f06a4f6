"""The operator as processes on a real API server: killed, frozen, doubled, and given a hundred deployments at once."""

from __future__ import annotations

import itertools
import random
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kube import ApiError, Kube, Manifest, ours, said
from operated import GatewayProcess, OperatorProcess, lines

SMALL = {"cpu": "1m", "memory": "16Mi"}
_NAMES = itertools.count()


class Ground:
    """What the tests of this file share: an API server with nodes, a gateway, and operators that end with the test."""

    def __init__(self, kube: Kube, gateway: GatewayProcess, folder: Path, space: str) -> None:
        self.kube, self.gateway, self.space = kube, gateway, space
        self._folder = folder
        self._operators: list[OperatorProcess] = []

    def operator(self, lease_space: str = "") -> OperatorProcess:
        """A live one. In a `lease_space` with others it may have to wait; without, it leads when this returns."""
        made = OperatorProcess(self._folder, self.gateway.address, f"operator-{next(_NAMES)}")
        made.start(lease_space or self.lease_space(), quick=bool(lease_space))
        self._operators.append(made)
        if not lease_space:
            self.kube.wait(made.leads, "it leads")
        return made

    def lease_space(self) -> str:
        name = f"lease-{next(_NAMES)}"
        self.kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        return name

    def stop(self) -> None:
        for each in self._operators:
            each.kill()

    def deploy(self, name: str, **spec: Any) -> None:
        spec = {"model": "/models/m", "resources": SMALL} | spec
        self.kube.apply(ours("ModelDeployment", name, **spec), self.space)

    def pods(self) -> list[str]:
        """Names of those that are here to stay."""
        return sorted(self._agents())

    def groups(self, deployment: str) -> list[str]:
        """The groups whose pods are here to stay."""
        labels = self._agents().values()
        return sorted(each["spillway.dev/group"] for each in labels if each["spillway.dev/deployment"] == deployment)

    def _agents(self) -> dict[str, dict[str, str]]:
        """Labels by name."""
        found = [each["metadata"] for each in self.kube.list("Pod", self.space).values()]
        here_to_stay = [each for each in found if "deletionTimestamp" not in each]
        return {each["name"]: each["labels"] for each in here_to_stay if "spillway.dev/deployment" in each["labels"]}


@pytest.fixture
def ground(nodes: Kube, gateway: GatewayProcess, tmp_path: Path, space: str) -> Iterator[Ground]:
    made = Ground(nodes, gateway, tmp_path, space)
    yield made
    made.stop()


def test_two_live_operators_have_one_leader_and_a_frozen_one_never_comes_back(ground: Ground) -> None:
    lease = ground.lease_space()
    first = ground.operator(lease)
    ground.kube.wait(first.leads, "the first leads")
    second = ground.operator(lease)
    ground.deploy("m", replicas=2)
    ground.kube.wait(lambda: len(ground.pods()) == 2, "both agents are made")
    assert not second.leads()
    first.send(signal.SIGSTOP)
    ground.deploy("m", replicas=3)
    ground.kube.wait(lambda: len(ground.pods()) == 3, "the second has taken over")
    first.send(signal.SIGCONT)
    assert first.ended() == 1
    assert "LeadershipLostError" in first.log
    ground.deploy("m", replicas=4)
    ground.kube.wait(lambda: len(ground.pods()) == 4, "the second goes on")
    assert ground.pods() == ["m-0-1", "m-1-1", "m-2-1", "m-3-1"]
    assert first.log.count("made m-") == 2
    second.send(signal.SIGTERM)
    assert second.ended() == 0
    assert ground.kube.get("Lease", "spillway-operator", lease)["spec"]["holderIdentity"] == "", "free for the next"


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_it_comes_to_what_is_asked_and_doubles_nothing(ground: Ground, seed: int) -> None:
    wishes = Wishes(ground, random.Random(seed))
    for _ in range(3):
        operator = ground.operator()
        for _ in range(6):
            wishes.change()
            time.sleep(wishes.chance.random() * 0.1)
        operator.kill()
        wishes.change()
    ground.operator()
    wishes.hold()


class Wishes:
    """What a person does to resources of all kinds, and what must have come of it."""

    def __init__(self, ground: Ground, chance: random.Random) -> None:
        self.ground, self.chance = ground, chance
        self.replicas: dict[str, int] = {}
        self.stores: dict[str, str | None] = {}
        self.jobs: dict[str, str] = {}
        self.deleted_jobs: set[str] = set()

    def change(self) -> None:
        self.chance.choice([self._deployment, self._deployment, self._store, self._job, self._job])()

    def _deployment(self) -> None:
        name = f"m{self.chance.randint(0, 2)}"
        if name in self.replicas and self.chance.random() < 0.3:
            self.ground.kube.delete("ModelDeployment", name, self.ground.space)
            del self.replicas[name]
        elif not self._is_going("ModelDeployment", name):
            self.replicas[name] = self.chance.randint(0, 3)
            self.ground.deploy(name, replicas=self.replicas[name])

    def _store(self) -> None:
        name = f"s{self.chance.randint(0, 1)}"
        if name not in self.stores:
            self.ground.kube.apply(ours("KVStore", name, managed={}), self.ground.space)
            self.stores[name] = None
        found = self.ground.kube.find("Secret", f"{name}-redis", self.ground.space)
        if found is not None:
            assert self.stores[name] in (None, found["data"]["password"]), "a password is made once"
            self.stores[name] = found["data"]["password"]

    def _job(self) -> None:
        name = f"b{self.chance.randint(0, 2)}"
        if name in self.jobs and self.chance.random() < 0.5:
            self.ground.kube.delete("BatchJob", name, self.ground.space)
            self.deleted_jobs.add(self.jobs.pop(name))
        elif name in self.jobs:
            patch = {"spec": {"paused": self.chance.random() < 0.5}}
            self.ground.kube.patch("BatchJob", name, self.ground.space, patch)
        elif not self._is_going("BatchJob", name):
            made = ours("BatchJob", name, model="nobody", input={"inline": lines(2)})
            self.jobs[name] = self.ground.kube.create(made, self.ground.space)["metadata"]["uid"]

    def _is_going(self, kind: str, name: str) -> bool:
        return self.ground.kube.find(kind, name, self.ground.space) is not None and name not in (
            self.replicas if kind == "ModelDeployment" else self.jobs
        )

    def hold(self) -> None:
        ground = self.ground
        for name, replicas in self.replicas.items():
            wanted = [str(index) for index in range(replicas)]
            ground.kube.wait(lambda: ground.groups(name) == wanted, f"{name} has {replicas} groups, one pod each")  # noqa: B023 - called before the next turn
        for name in self.stores:
            self._settled(lambda: self._is_made(name), f"{name} is made")  # noqa: B023 - called before the next turn
        for name, uid in self.jobs.items():
            self._settled(lambda: self._is_mirrored(name, uid), f"{name} is mirrored")  # noqa: B023 - called before the next turn
            assert len(ground.gateway.of(uid)) == 1
        for uid in self.deleted_jobs:
            self._settled(lambda: all(job.HasField("end_time") for job in ground.gateway.of(uid)), "it is cancelled")  # noqa: B023 - called before the next turn
            assert len(ground.gateway.of(uid)) <= 1
        live = {each["metadata"]["uid"] for each in ground.kube.list("BatchJob", ground.space).values()}
        assert live <= set(self.jobs.values()) | self.deleted_jobs

    def _settled(self, true: Callable[[], bool], what: str) -> None:
        self.ground.kube.wait(true, what)

    def _is_made(self, name: str) -> bool:
        found = self.ground.kube.find("Secret", f"{name}-redis", self.ground.space)
        if found is None or self.ground.kube.find("StatefulSet", f"{name}-redis", self.ground.space) is None:
            return False
        assert self.stores[name] in (None, found["data"]["password"]), "a password is made once"
        return True

    def _is_mirrored(self, name: str, uid: str) -> bool:
        found = self.ground.kube.get("BatchJob", name, self.ground.space)
        state = "Paused" if found["spec"].get("paused") else "Running"
        jobs = self.ground.gateway.of(uid)
        return found.get("status", {}).get("state") == state and [job.name for job in jobs] == [found["status"]["job"]]


def test_a_hundred_deployments_take_a_handful_of_writes_each_and_then_none(ground: Ground) -> None:
    operator = ground.operator()
    names = [f"d{number}" for number in range(100)]
    for name in names:
        ground.deploy(name)
    ground.kube.wait(lambda: len(ground.pods()) == 100, "every deployment has its agent")
    ground.kube.wait(
        lambda: all(is_placed(each) for each in ground.kube.list("ModelDeployment", ground.space).values()),
        "all are placed",
    )
    quiet = ground.kube.wait(lambda: quiet_for(ground, 2.0), "nothing is left to write")
    writes = Counter(deployment_of(each) for each in quiet)
    assert set(writes) == set(names)
    assert max(writes.values()) <= 7, writes.most_common(5)
    assert "kopf" not in operator.log, "what a person needs, and no more"
    with urllib.request.urlopen(f"http://{operator.health}/healthz", timeout=20) as answer:
        assert answer.status == 200
    mean = sum(writes.values()) / 100
    assert mean <= 6, f"{mean} writes a deployment"


def is_placed(deployment: Manifest) -> bool:
    groups = deployment.get("status", {}).get("groups", [])
    return bool(groups) and all(each["phase"] == "Placed" for each in groups)


def quiet_for(ground: Ground, seconds: float) -> list[Any] | None:
    """The operator's writes in this namespace, once there were no more for so long."""
    before = operators_writes(ground)
    time.sleep(seconds)
    after = operators_writes(ground)
    return after if len(after) == len(before) else None


def operators_writes(ground: Ground) -> list[Any]:
    """What the API server's audit says of them, refused ones included."""
    return [
        row
        for row in ground.kube.plane.audited()
        if row.get("userAgent", "").startswith("spillway-operator/")
        and row.get("objectRef", {}).get("namespace") == ground.space
    ]


def deployment_of(row: Any) -> str:
    """The deployment that an object belongs to: d7 of d7, d7-agents, d7-0-1."""
    name: str = row["objectRef"]["name"]
    return name.partition("-")[0]


def test_a_change_between_read_and_write_is_taken_up(ground: Ground) -> None:
    ground.operator()
    for replicas in range(1, 13):  # each while the operator is still busy with the one before
        ground.deploy("m", replicas=replicas % 4)
        for name in ground.pods():
            annotate(ground, name, str(replicas))
    ground.deploy("m", replicas=3)
    ground.kube.wait(lambda: ground.groups("m") == ["0", "1", "2"], "three groups, one pod each")
    ground.kube.wait(lambda: is_told(ground, 3), "the status is about the last spec")
    names = [name.rsplit("-", 1) for name in ground.pods()]
    assert len({group for group, _ in names}) == 3


def annotate(ground: Ground, pod: str, text: str) -> None:
    try:
        ground.kube.patch("Pod", pod, ground.space, {"metadata": {"annotations": {"somebody/else": text}}})
    except ApiError as error:
        if error.status != 404:
            raise


def is_told(ground: Ground, replicas: int) -> bool:
    found = ground.kube.get("ModelDeployment", "m", ground.space)
    status = found["status"]
    is_current: bool = status["observedGeneration"] == found["metadata"]["generation"]
    return is_current and status["replicas"] == replicas and f"of {replicas} groups" in said(found, "Ready")["message"]
