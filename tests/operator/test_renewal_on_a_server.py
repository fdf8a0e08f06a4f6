"""An upgrade that changes what agents are made of: one after the other is renewed, while jobs and the others go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kube import Kube, ours
from operated import GatewayProcess, config, lines

from spillway.api.client.target import Target
from spillway.operator.batch_jobs import BatchJobs
from spillway.operator.cluster import Cluster
from spillway.operator.config import OperatorConfig, RedisSettings
from spillway.operator.deployments import Deployments
from spillway.operator.errors import ConflictError
from spillway.operator.gateway import Gateway
from spillway.operator.kv_stores import KVStores

REPLICAS = 3
OLD, NEW = (config(agents={"image": f"spillway-agent:{version}"}) for version in (1, 2))
SMALL = {"cpu": "1m", "memory": "16Mi"}


class Rollout:
    """A deployment and a job in a namespace, an operator that is new at each look, and a kubelet's part."""

    def __init__(self, kube: Kube, space: str, gateway: GatewayProcess) -> None:
        self.kube, self.space, self.gateway = kube, space, gateway
        self.now_s = 1_800_000_000.0
        self.fewest_ready = REPLICAS

    def look(self, settings: OperatorConfig) -> int:
        """One look at each of the two; how much it wrote."""

        async def once() -> int:
            async with Cluster() as cluster, Gateway(Target(self.gateway.address)) as gateway:
                stores = KVStores(cluster, RedisSettings(image="redis:test"))
                await Deployments(cluster, settings, stores, asyncio.Lock()).reconcile(self.space, "m", self.now_s)
                await BatchJobs(cluster, gateway).reconcile(self.space, "b", self.now_s)
                return cluster.writes

        try:
            return asyncio.run(once())
        except ConflictError:  # the scheduler was faster
            return 1

    def pods(self) -> dict[str, Any]:
        found = self.kube.list("Pod", self.space).items()
        return {name: pod for name, pod in found if "spillway.dev/deployment" in pod["metadata"]["labels"]}

    def kubelet(self) -> None:
        """Pods that have a node run, and those that are to go are gone."""
        for name, pod in self.pods().items():
            if "deletionTimestamp" in pod["metadata"]:
                self.kube.delete("Pod", name, self.space, gracePeriodSeconds=0)
            elif not pod["spec"].get("schedulingGates") and not is_ready(pod):
                status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
                self.kube.patch("Pod", name, self.space, {"status": status}, "/status")

    def run(self, settings: OperatorConfig) -> None:
        """Until a look and a kubelet have nothing to do, keeping count of how few agents were ready."""
        for _ in range(60):
            written = self.look(settings)
            ready = [
                pod for pod in self.pods().values() if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]
            ]
            self.fewest_ready = min(self.fewest_ready, len(ready))
            before = self.pods()
            self.kubelet()
            if written == 0 and self.pods() == before:
                return
        raise AssertionError("it never comes to rest")

    def images(self) -> dict[str, str]:
        return {name: pod["spec"]["containers"][0]["image"] for name, pod in self.pods().items()}


def is_ready(pod: dict[str, Any]) -> bool:
    said = pod.get("status", {}).get("conditions", ())
    return any(each["type"] == "Ready" and each["status"] == "True" for each in said)


@pytest.fixture
def rollout(nodes: Kube, space: str, gateway: GatewayProcess) -> Rollout:
    nodes.apply(ours("ModelDeployment", "m", model="/models/m", replicas=REPLICAS, resources=SMALL), space)
    nodes.create(ours("BatchJob", "b", model=f"m-{space}", input={"inline": lines(2)}), space)
    made = Rollout(nodes, space, gateway)
    made.run(OLD)
    return made


def test_agents_are_renewed_one_at_a_time_and_the_job_goes_on(rollout: Rollout) -> None:
    assert rollout.images() == {f"m-{group}-1": "spillway-agent:1" for group in range(REPLICAS)}
    job = rollout.kube.get("BatchJob", "b", rollout.space)
    rollout.fewest_ready = REPLICAS
    rollout.run(NEW)
    assert rollout.images() == {f"m-{group}-2": "spillway-agent:2" for group in range(REPLICAS)}
    assert rollout.fewest_ready == REPLICAS - 1
    assert len(rollout.gateway.of(job["metadata"]["uid"])) == 1
    assert rollout.kube.get("BatchJob", "b", rollout.space)["status"]["job"] == job["status"]["job"]


def test_what_does_not_start_stops_the_renewal_at_the_first(rollout: Rollout) -> None:
    for _ in range(6):
        rollout.look(NEW)  # the new image cannot be pulled
        for name, pod in rollout.pods().items():
            if "deletionTimestamp" in pod["metadata"]:
                rollout.kube.delete("Pod", name, rollout.space, gracePeriodSeconds=0)
    images = list(rollout.images().values())
    assert sorted(images) == ["spillway-agent:1"] * (REPLICAS - 1) + ["spillway-agent:2"]
    rollout.run(OLD)
    assert set(rollout.images().values()) == {"spillway-agent:1"}
