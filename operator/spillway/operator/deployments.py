"""One look at a ModelDeployment, and what follows from it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spillway.api.resources import ModelDeployment
from spillway.operator.cluster import Cluster, Key, ensure, secret_lacks, tell_status
from spillway.operator.config import OperatorConfig
from spillway.operator.desired import agents
from spillway.operator.desired.agents import PodName
from spillway.operator.desired.deployment_status import (
    REFUSED,
    Blocks,
    Refused,
    found_status,
    refused_status,
    remembered,
    still_refused,
)
from spillway.operator.desired.groups import AgentPod, Decision, Phase, decide
from spillway.operator.desired.kv_store import trusting
from spillway.operator.desired.namesakes import name_taken
from spillway.operator.errors import ConfigError, RefusedError
from spillway.operator.kv_stores import KVStores, Shared
from spillway.operator.names import DEPLOYMENT_LABEL
from spillway.operator.observe import agent_pod, nodes
from spillway.operator.placement import Refusal, place

log = logging.getLogger(__name__)

ROOM_RETRY_S = 10.0
"""How soon to look for room again where there was none: what frees it may be nobody's we watch."""
STORE_RETRY_S = 2.0
"""How soon to look again for the KVStore that a deployment names."""

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Deployments:
    """Carries out decisions on ModelDeployments. `placing` is held while nodes are chosen: one promise at a time."""

    cluster: Cluster
    config: OperatorConfig
    stores: KVStores
    placing: asyncio.Lock

    async def reconcile(self, namespace: str, name: str, now_s: float) -> float | None:
        """Looks, decides, acts. Returns the Unix time to look again at the latest, or None.

        Repeated after any failure it goes on where it was. Raises ClusterError, ConfigError: look again soon.
        """
        key = Key("ModelDeployment", namespace, name)
        namesakes = await self.cluster.list(
            "/apis/spillway.dev/v1alpha1/modeldeployments", fieldSelector=f"metadata.name={name}"
        )
        manifest = next((each for each in namesakes if each["metadata"]["namespace"] == namespace), None)
        if manifest is None or "deletionTimestamp" in manifest["metadata"]:
            return None  # the cluster deletes what it owned
        deployment = ModelDeployment.read(manifest)
        refused = agents.unsupported(deployment) or name_taken(manifest, namesakes)
        if refused is not None:
            why = Refused("NotSupported", refused)
            await tell_status(self.cluster, key, manifest, refused_status(deployment, why, now_s))
            return now_s + ROOM_RETRY_S
        listed = await self._pods(deployment)
        pods = [agent_pod(each) for each in listed]
        decision = decide(
            deployment.spec.replicas,
            agents.template(deployment, self.config),
            remembered(deployment.status),
            pods,
            now_s,
        )
        blocks = await self._secret(deployment)
        gated = _gated(decision, listed, pods)
        if blocks is not None and blocks.is_missing:  # agents cannot start without what the Secret is to hold
            placed: dict[str, str] = {}
            refusals = {agent_pod(each).group: blocks.message for each in gated}
        else:
            placed, refusals = await self._place(deployment, gated, pods)
        seen = [
            replace(pod, node=placed[pod.name], phase=Phase.STARTING) if pod.name in placed else pod for pod in pods
        ]
        # The generations first: a crash after this skips numbers, a crash before it changed nothing.
        status = found_status(deployment, decision.groups, seen, refusals, blocks, now_s)
        if decision.create:
            status = still_refused(deployment, status)
        await tell_status(self.cluster, key, manifest, status)
        try:
            await self._carry_out(deployment, decision)
        except RefusedError as error:  # a quota, an admission rule: what people must hear of
            latest = await self.cluster.get(key)
            why = Refused(REFUSED, f"the cluster refuses what agents need: {error}")
            await tell_status(self.cluster, key, latest, refused_status(ModelDeployment.read(latest), why, now_s))
            raise
        wakes = [] if decision.wake_s is None else [decision.wake_s]
        if refusals:
            wakes.append(now_s + (STORE_RETRY_S if blocks is not None and blocks.is_missing else ROOM_RETRY_S))
        return min(wakes, default=None)

    async def _carry_out(self, deployment: ModelDeployment, decision: Decision) -> None:
        namespace = deployment.metadata.namespace
        await ensure(self.cluster, agents.service(deployment))
        for group, generation in decision.create:
            which = PodName(group, generation)
            await self.cluster.create(agents.pod(deployment, which, self.config))
            log.info("ModelDeployment %s/%s: made %s", namespace, deployment.metadata.name, which.of(deployment))
        for doomed in decision.delete:
            await self.cluster.delete(Key("Pod", namespace, doomed))
            log.info("ModelDeployment %s/%s: deleted %s", namespace, deployment.metadata.name, doomed)

    async def _secret(self, deployment: ModelDeployment) -> Blocks | None:
        """Hands agents what they must know. Returns what is to be said of shared blocks, None where none are asked for.

        What is missing leaves the Secret as it was: agents that run go on, with what they have.
        """
        gateway, store = self.config.gateway, deployment.spec.kv_store
        files = {agents.TOKEN_KEY: gateway.agent_token_file, agents.AUTHORITY_KEY: gateway.ca_file}
        try:
            entries = {key: path.read_bytes().strip() for key, path in files.items() if path is not None}
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error
        blocks = None
        if store is not None:
            shared = await self.stores.shared(deployment.metadata.namespace, store.name)
            if isinstance(shared, str):
                return Blocks(shared, is_missing=True)
            if store.peer_tls is not None:
                lacking = await secret_lacks(
                    self.cluster, deployment.metadata.namespace, store.peer_tls.secret_name, agents.PEER_TLS_KEYS
                )
                if lacking is not None:
                    return Blocks(lacking, is_missing=True)
            blocks = Blocks(store.name)
            entries |= of_store(shared)
        if entries:
            await ensure(self.cluster, agents.secret(deployment, entries))
        return blocks

    async def _pods(self, deployment: ModelDeployment) -> list[Manifest]:
        metadata = deployment.metadata
        found = await self.cluster.list(
            f"/api/v1/namespaces/{metadata.namespace}/pods", labelSelector=f"{DEPLOYMENT_LABEL}={metadata.name}"
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


def _gated(decision: Decision, listed: Sequence[Manifest], pods: Sequence[AgentPod]) -> list[Manifest]:
    """Pods that are here to stay and wait for a node."""
    current = {(group.index, group.generation) for group in decision.groups}
    return [
        each
        for each, pod in zip(listed, pods, strict=True)
        if pod.phase is Phase.GATED and (pod.group, pod.generation) in current and pod.name not in decision.delete
    ]


def of_store(shared: Shared) -> dict[str, bytes]:
    """Entries of the agents' Secret."""
    entries = {agents.INDEX_KEY: shared.index_url, agents.PEER_TOKEN_KEY: shared.peer_token}
    if shared.authority is None:
        return entries
    entries[agents.INDEX_KEY] = trusting(shared.index_url, agents.INDEX_AUTHORITY_FILE)
    return entries | {agents.INDEX_AUTHORITY_KEY: shared.authority}
