"""One look at a ModelDeployment, and what follows from it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spillway.api.resources import ModelDeployment
from spillway.api.resources.model_deployment import ModelDeploymentStatus
from spillway.operator.cluster import Cluster, Key
from spillway.operator.desired import agents
from spillway.operator.desired.agents import AgentSettings
from spillway.operator.desired.deployment_status import found_status, refused_status, remembered
from spillway.operator.desired.groups import AgentPod, Phase, decide
from spillway.operator.errors import NotFoundError
from spillway.operator.names import DEPLOYMENT_LABEL
from spillway.operator.observe import agent_pod, nodes
from spillway.operator.placement import Refusal, place

ROOM_RETRY_S = 10.0
"""How soon to look for room again where there was none: what frees it may be nobody's we watch."""

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Deployments:
    """Carries out decisions on ModelDeployments. `placing` is held while nodes are chosen: one promise at a time."""

    cluster: Cluster
    settings: AgentSettings
    placing: asyncio.Lock

    async def reconcile(self, namespace: str, name: str, now_s: float) -> float | None:
        """Looks, decides, acts. Returns the Unix time to look again at the latest, or None.

        Repeated after any failure it goes on where it was. Raises ClusterError: look again soon.
        """
        key = Key("ModelDeployment", namespace, name)
        try:
            manifest = await self.cluster.get(key)
        except NotFoundError:
            return None  # the cluster deletes what it owned
        if "deletionTimestamp" in manifest["metadata"]:
            return None
        deployment = ModelDeployment.read(manifest)
        refused = agents.unsupported(deployment)
        if refused is not None:
            await self._tell(key, manifest, refused_status(deployment, refused, now_s))
            return None
        listed = await self._pods(deployment)
        pods = [agent_pod(each) for each in listed]
        decision = decide(
            deployment.spec.replicas,
            agents.template(deployment, self.settings),
            remembered(deployment.status),
            pods,
            now_s,
        )
        current = {(group.index, group.generation) for group in decision.groups}
        gated = [
            each
            for each, pod in zip(listed, pods, strict=True)
            if pod.phase is Phase.GATED and (pod.group, pod.generation) in current and pod.name not in decision.delete
        ]
        placed, refusals = await self._place(deployment, gated, pods)
        seen = [
            replace(pod, node=placed[pod.name], phase=Phase.STARTING) if pod.name in placed else pod for pod in pods
        ]
        # The generations first: a crash after this skips numbers, a crash before it changed nothing.
        await self._tell(key, manifest, found_status(deployment, decision.groups, seen, refusals, now_s))
        await self._ensure_service(deployment)
        for group, generation in decision.create:
            await self.cluster.create(agents.pod(deployment, group, generation, self.settings))
        for doomed in decision.delete:
            await self.cluster.delete(Key("Pod", namespace, doomed))
        wakes = [] if decision.wake_s is None else [decision.wake_s]
        return min(wakes + ([now_s + ROOM_RETRY_S] if refusals else []), default=None)

    async def _ensure_service(self, deployment: ModelDeployment) -> None:
        try:
            await self.cluster.get(Key("Service", deployment.metadata.namespace, agents.service_name(deployment)))
        except NotFoundError:
            await self.cluster.apply(agents.service(deployment))

    async def _pods(self, deployment: ModelDeployment) -> list[Manifest]:
        metadata = deployment.metadata
        found = await self.cluster.list(
            f"/api/v1/namespaces/{metadata.namespace}/pods", f"{DEPLOYMENT_LABEL}={metadata.name}"
        )
        # Pods of a deleted deployment of the same name are the cluster's to remove.
        return [
            each
            for each in found
            if any(owner["uid"] == metadata.uid for owner in each["metadata"].get("ownerReferences", ()))
        ]

    async def _place(
        self, deployment: ModelDeployment, gated: Sequence[Manifest], pods: Sequence[AgentPod]
    ) -> tuple[dict[str, str], dict[int, str]]:
        """Chooses nodes and lifts gates. Returns nodes by name of pod, and by group why there is none."""
        if not gated:
            return {}, {}
        wanted = agents.needs(deployment)
        siblings = Counter(pod.node for pod in pods if pod.node is not None)
        placed: dict[str, str] = {}
        refusals: dict[int, str] = {}
        async with self.placing:
            free = nodes(await self.cluster.list("/api/v1/nodes"), await self.cluster.list("/api/v1/pods"))
            for manifest in gated:
                chosen = place(wanted, free, siblings)
                if isinstance(chosen, Refusal):
                    refusals[agent_pod(manifest).group] = chosen.message
                    continue
                await self._lift(manifest, chosen.name)
                placed[manifest["metadata"]["name"]] = chosen.name
                siblings[chosen.name] += 1
                free = [each.less(wanted) if each.name == chosen.name else each for each in free]
        return placed, refusals

    async def _lift(self, pod: Manifest, node: str) -> None:
        """Node and gate in one patch: no moment in which the scheduler could choose for itself."""
        metadata = pod["metadata"]
        patch = {
            "metadata": {"resourceVersion": metadata["resourceVersion"]},
            "spec": {"affinity": agents.on_node(node), "schedulingGates": []},
        }
        await self.cluster.merge(Key("Pod", metadata["namespace"], metadata["name"]), patch)

    async def _tell(self, key: Key, manifest: Manifest, status: ModelDeploymentStatus) -> None:
        """Writes the status where it changed. Raises ConflictError where the object did since."""
        said = status.model_dump(by_alias=True, exclude_none=True, mode="json")
        former = manifest.get("status", {})
        if said == former:
            return
        gone = {field: None for field in former if field not in said}
        metadata = {"resourceVersion": manifest["metadata"]["resourceVersion"]}
        await self.cluster.merge(key, {"metadata": metadata, "status": said | gone}, "/status")
