"""What was found of a ModelDeployment to its status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from spillway.api.resources import ModelDeployment
from spillway.api.resources.model_deployment import GroupStatus, ModelDeploymentStatus
from spillway.operator.desired.agents import labels
from spillway.operator.desired.conditions import Finding, conditions, rfc3339
from spillway.operator.desired.groups import AgentPod, Group, Phase

_PHASES: dict[Phase, Literal["Waiting", "Placed", "Ready", "Restarting"]] = {
    Phase.GATED: "Waiting",
    Phase.STARTING: "Placed",
    Phase.READY: "Ready",
    Phase.LOST: "Restarting",
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """How blocks are shared: through the KVStore `message`, or not, and then it says why."""

    message: str
    is_missing: bool = False


def remembered(status: ModelDeploymentStatus) -> tuple[Group, ...]:
    """The groups that a status tells of."""
    return tuple(
        Group(
            each.index,
            each.generation,
            each.failures,
            datetime.fromisoformat(each.not_before).timestamp() if each.not_before else 0.0,
        )
        for each in status.groups
    )


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a spec is not carried out, in one word and in one sentence."""

    reason: str
    message: str


def refused_status(deployment: ModelDeployment, why: Refused, now_s: float) -> ModelDeploymentStatus:
    """Of a spec that cannot be run: groups and all else that was said as they were."""
    finding = Finding("Ready", holds=False, reason=why.reason, message=why.message)
    generation = deployment.metadata.generation
    former = deployment.status.conditions
    said = [
        *conditions([finding], former, generation, rfc3339(now_s)),
        *(each for each in former if each.type != "Ready"),
    ]
    said.sort(key=lambda each: each.type)
    return deployment.status.model_copy(update={"observed_generation": generation, "conditions": tuple(said)})


REFUSED = "Refused"
"""Reason of a deployment whose agents the cluster does not take."""


def still_refused(deployment: ModelDeployment, status: ModelDeploymentStatus) -> ModelDeploymentStatus:
    """The status while what was refused is asked for again: it goes on to say so, and does not turn to and fro."""
    before = next(
        (each for each in deployment.status.conditions if (each.type, each.reason) == ("Ready", REFUSED)), None
    )
    if before is None:
        return status
    same = before.model_copy(update={"observed_generation": status.observed_generation})
    kept = tuple(same if each.type == "Ready" else each for each in status.conditions)
    return status.model_copy(update={"conditions": kept})


def found_status(
    deployment: ModelDeployment,
    groups: Sequence[Group],
    pods: Sequence[AgentPod],
    refusals: Mapping[int, str],
    blocks: Blocks | None,
    now_s: float,
) -> ModelDeploymentStatus:
    """The status. `groups`: as just decided; `refusals`: by group, why no node takes it."""
    replicas, generation = deployment.spec.replicas, deployment.metadata.generation
    told = tuple(_group(group, replicas, pods, refusals) for group in sorted(groups, key=lambda each: each.index))
    ready = sum(each.phase == "Ready" for each in told)
    return ModelDeploymentStatus(
        observed_generation=generation,
        replicas=len({pod.group for pod in pods}),
        ready_replicas=ready,
        selector=",".join(f"{key}={value}" for key, value in sorted(labels(deployment).items())),
        groups=told,
        conditions=conditions(
            _findings(deployment, ready, refusals, blocks), deployment.status.conditions, generation, rfc3339(now_s)
        ),
    )


def _group(group: Group, replicas: int, pods: Sequence[AgentPod], refusals: Mapping[int, str]) -> GroupStatus:
    own = [pod for pod in pods if pod.group == group.index]
    pod = next((each for each in own if each.generation == group.generation), None)
    phase: Literal["Waiting", "Placed", "Ready", "Restarting", "Stopping"]
    if group.index >= replicas:
        phase = "Stopping"
    elif pod is None:
        phase = "Waiting" if group.generation <= 1 else "Restarting"
    else:
        phase = _PHASES[pod.phase]
    return GroupStatus(
        index=group.index,
        generation=group.generation,
        phase=phase,
        node=pod.node if pod else None,
        failures=group.failures,
        not_before=rfc3339(group.not_before_s) if group.not_before_s else None,
        message=refusals.get(group.index, "")[:512],
    )


def _findings(
    deployment: ModelDeployment, ready: int, refusals: Mapping[int, str], blocks: Blocks | None
) -> list[Finding]:
    replicas = deployment.spec.replicas
    placed = not refusals
    is_waiting = blocks is not None and blocks.is_missing
    why = "" if placed else next(iter(refusals.values()))
    if why and not is_waiting:
        why = f"an agent {why}"
    message = f"{ready} of {replicas} groups are ready" + (f"; {why}" if why else "")
    no_node = "NoKVStore" if is_waiting else "NoRoom"
    found = [
        Finding("Ready", ready == replicas, "AllReady" if ready == replicas else "NotReady", message),
        Finding("Placed", placed, "NodesChosen" if placed else no_node, why),
    ]
    if blocks is not None:
        sentence = blocks.message if is_waiting else f"agents find each other's blocks through KVStore {blocks.message}"
        found.append(Finding("BlocksShared", not is_waiting, no_node if is_waiting else "Shared", sentence))
    return found
