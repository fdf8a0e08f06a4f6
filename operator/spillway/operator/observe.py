"""Objects of a cluster as the decisions want them: agent pods, and nodes with what is free on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spillway.api.resources import quantity_bytes
from spillway.operator.desired.agents import cpu_millis
from spillway.operator.desired.groups import AgentPod, Phase
from spillway.operator.names import GENERATION_LABEL, GPU, GROUP_LABEL, TEMPLATE_ANNOTATION
from spillway.operator.placement import Needs, Node, Taint

Manifest = dict[str, Any]


def agent_pod(pod: Manifest) -> AgentPod:
    """An agent's pod, which carries our labels."""
    metadata = pod["metadata"]
    deleting = "deletionTimestamp" in metadata
    return AgentPod(
        name=metadata["name"],
        group=int(metadata["labels"][GROUP_LABEL]),
        generation=int(metadata["labels"][GENERATION_LABEL]),
        template=int(metadata["annotations"][TEMPLATE_ANNOTATION]),
        phase=Phase.LOST if deleting else _phase(pod),
        deleting=deleting,
        node=node_of(pod),
    )


def _phase(pod: Manifest) -> Phase:
    status = pod.get("status", {})
    if status.get("phase") in ("Failed", "Succeeded"):
        return Phase.LOST
    if pod["spec"].get("schedulingGates"):
        return Phase.GATED
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", ()))
    return Phase.READY if ready else Phase.STARTING


def node_of(pod: Manifest) -> str | None:
    """The node that a pod is bound to or promised to."""
    bound: str | None = pod["spec"].get("nodeName")
    if bound:
        return bound
    affinity = pod["spec"].get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    for term in required.get("nodeSelectorTerms", ()):
        for field in term.get("matchFields", ()):
            if field["key"] == "metadata.name" and field["operator"] == "In" and len(field["values"]) == 1:
                promised: str = field["values"][0]
                return promised
    return None


def nodes(listed: Iterable[Manifest], pods: Iterable[Manifest]) -> list[Node]:
    """What is free on each node. `pods`: all of the cluster."""
    free = {each["metadata"]["name"]: _whole(each) for each in listed}
    for pod in pods:
        node = node_of(pod)
        if node in free and pod.get("status", {}).get("phase") not in ("Failed", "Succeeded"):
            free[node] = free[node].less(_requested(pod))
    return list(free.values())


def _whole(node: Manifest) -> Node:
    status, spec = node.get("status", {}), node.get("spec", {})
    offered = status.get("allocatable", {})
    return Node(
        name=node["metadata"]["name"],
        gpus=int(offered.get(GPU, "0")),
        memory_bytes=quantity_bytes(offered.get("memory", "0")),
        cpu_millis=cpu_millis(offered.get("cpu", "0")),
        pods=int(offered.get("pods", "0")),
        ready=not spec.get("unschedulable", False)
        and any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", ())),
        labels=node["metadata"].get("labels", {}),
        taints=tuple(Taint(each["key"], each.get("value", ""), each["effect"]) for each in spec.get("taints", ())),
    )


def _requested(pod: Manifest) -> Needs:
    """Of all containers at once; init containers one after the other, with their largest."""
    running = [_container(each) for each in pod["spec"].get("containers", ())]
    first = [_container(each) for each in pod["spec"].get("initContainers", ())]
    gpus, memory, cpu = (
        max([sum(each[index] for each in running), *(each[index] for each in first)]) for index in range(3)
    )
    return Needs(gpus, memory, cpu)


def _container(container: Manifest) -> tuple[int, int, int]:
    asked = container.get("resources", {}).get("requests", {})
    return int(asked.get(GPU, "0")), quantity_bytes(asked.get("memory", "0")), cpu_millis(asked.get("cpu", "0"))
