"""ModelDeployment to its agents: a gated pod for a group at a generation, and their headless service."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from spillway.api.resources import ModelDeployment, quantity_bytes
from spillway.api.resources.common import API_VERSION
from spillway.operator.names import (
    DEPLOYMENT_LABEL,
    GENERATION_LABEL,
    GPU,
    GROUP_LABEL,
    PLACEMENT_GATE,
    TEMPLATE_ANNOTATION,
)
from spillway.operator.placement import Needs, Toleration

HEALTH_PORT = 8080
MAX_NAME = 50
"""Letters of a deployment's name: group and generation follow it in the names of pods, which end at 63."""
_USER = 65532
_LOST_NODE_S = 30
"""How long a pod stays with a node that does not answer: as long as leases of lines live, about."""

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What agents are made of, from the operator's settings. `gateway`: HOST:PORT of the batch service."""

    image: str
    gateway: str
    pull_policy: str = "IfNotPresent"


def unsupported(deployment: ModelDeployment) -> str | None:
    """One sentence on what of the spec cannot be run yet, or None."""
    parallelism = deployment.spec.parallelism
    ranks = parallelism.tensor * parallelism.pipeline
    if ranks > 1:
        return (
            f"a replica over {ranks} ranks is not supported yet; set parallelism.tensor and parallelism.pipeline to 1"
        )
    if len(deployment.metadata.name) > MAX_NAME:
        return f"the name is longer than {MAX_NAME} letters"
    return None


def needs(deployment: ModelDeployment) -> Needs:
    """What one agent asks its node for."""
    spec = deployment.spec
    return Needs(
        gpus=spec.resources.gpus,
        memory_bytes=quantity_bytes(spec.resources.memory),
        cpu_millis=cpu_millis(spec.resources.cpu),
        node_selector=spec.placement.node_selector,
        tolerations=tuple(
            Toleration(each.key, (each.value or "") if each.operator == "Equal" else None, each.effect)
            for each in spec.placement.tolerations
        ),
    )


def cpu_millis(quantity: str) -> int:
    """Thousandths of a CPU in a Kubernetes quantity: "2", "0.5", "500m"."""
    return int(quantity[:-1]) if quantity.endswith("m") else round(float(quantity) * 1000)


def labels(deployment: ModelDeployment) -> dict[str, str]:
    """What selects the agents of a deployment."""
    return {"app.kubernetes.io/name": "spillway-agent", DEPLOYMENT_LABEL: deployment.metadata.name}


def service_name(deployment: ModelDeployment) -> str:
    """Of the headless service, under which agents find each other."""
    return f"{deployment.metadata.name}-agents"


def service(deployment: ModelDeployment) -> Manifest:
    """The headless service. Agents have a name in it before they are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(deployment, service_name(deployment), labels(deployment)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels(deployment),
            "ports": [{"name": "health", "port": HEALTH_PORT, "targetPort": "health", "protocol": "TCP"}],
        },
    }


def pod(deployment: ModelDeployment, group: int, generation: int, settings: AgentSettings) -> Manifest:
    """The agent of a group at a generation, held by the gate until its node is chosen.

    It never restarts in place: what started before and what starts now must differ in their generation.
    """
    name = f"{deployment.metadata.name}-{group}-{generation}"
    own = labels(deployment) | {GROUP_LABEL: str(group), GENERATION_LABEL: str(generation)}
    metadata = _metadata(deployment, name, own)
    metadata["annotations"] = {TEMPLATE_ANNOTATION: str(template(deployment, settings))}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": _pod_spec(deployment, name, settings)}


def template(deployment: ModelDeployment, settings: AgentSettings) -> int:
    """A digest of what agents are made from. The number of replicas is no part of it: scaling restarts nobody."""
    text = json.dumps(_pod_spec(deployment, "", settings), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def on_node(node: str) -> Manifest:
    """The node affinity that binds a gated pod to its node, and nowhere else."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    terms = {"nodeSelectorTerms": [{"matchFields": [field]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _pod_spec(deployment: ModelDeployment, name: str, settings: AgentSettings) -> Manifest:
    spec = deployment.spec
    body: Manifest = {
        "schedulingGates": [{"name": PLACEMENT_GATE}],
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostname": name,
        "subdomain": service_name(deployment),
        "terminationGracePeriodSeconds": spec.grace_period_seconds + 5,
        "nodeSelector": dict(spec.placement.node_selector),
        "tolerations": _tolerations(deployment),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(deployment, name, settings)],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    if spec.kv.disk is not None:
        body["volumes"].append({"name": "kv", "emptyDir": {}})
    return body


def _container(deployment: ModelDeployment, name: str, settings: AgentSettings) -> Manifest:
    spec = deployment.spec
    amounts = {"cpu": spec.resources.cpu, "memory": spec.resources.memory}
    limits = {"memory": spec.resources.memory}
    if spec.resources.gpus:
        amounts[GPU] = limits[GPU] = str(spec.resources.gpus)
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - a volume of the pod's own
    if spec.kv.disk is not None:
        mounts.append({"name": "kv", "mountPath": "/kv"})
    return {
        "name": "agent",
        "image": settings.image,
        "imagePullPolicy": settings.pull_policy,
        "args": _arguments(deployment, name, settings),
        "ports": [{"name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": "health"}, "periodSeconds": 3, "timeoutSeconds": 3},
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "port": "health"},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
        "resources": {"requests": amounts, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _arguments(deployment: ModelDeployment, name: str, settings: AgentSettings) -> list[str]:
    spec = deployment.spec
    said = {
        "model": spec.model,
        "gateway": settings.gateway,
        "served-model": deployment.metadata.name,
        "name": name,
        "health-listen": f"0.0.0.0:{HEALTH_PORT}",
        "grace": str(spec.grace_period_seconds),
        "device": "cuda" if spec.resources.gpus else "cpu",
        "block-tokens": str(spec.kv.block_tokens),
        "dtype": None if spec.kv.dtype == "auto" else spec.kv.dtype,
        "device-kv": spec.kv.device,
        "host-kv": spec.kv.host,
        "disk-kv": spec.kv.disk,
        "disk-dir": None if spec.kv.disk is None else "/kv",
    }
    return ["agent", *(f"--{option}={value}" for option, value in said.items() if value is not None)]


def _tolerations(deployment: ModelDeployment) -> list[Manifest]:
    asked = [
        {key: value for key, value in each.model_dump().items() if value is not None}
        for each in deployment.spec.placement.tolerations
    ]
    lost = [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": _LOST_NODE_S,
        }
        for state in ("not-ready", "unreachable")
    ]
    return asked + lost


def _metadata(deployment: ModelDeployment, name: str, own: dict[str, str]) -> Manifest:
    """Owned by the deployment, so that the cluster itself cleans up, with or without an operator."""
    return {
        "name": name,
        "namespace": deployment.metadata.namespace,
        "labels": own,
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": "ModelDeployment",
                "name": deployment.metadata.name,
                "uid": deployment.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
