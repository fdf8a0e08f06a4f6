"""ModelDeployment to its agents: a gated pod for a group at a generation, their headless service, their Secret."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spillway.api.resources import ModelDeployment, quantity_bytes
from spillway.operator.config import OperatorConfig
from spillway.operator.desired.owned import metadata
from spillway.operator.names import (
    DEPLOYMENT_LABEL,
    GENERATION_LABEL,
    GPU,
    GROUP_LABEL,
    PLACEMENT_GATE,
    STORE_LABEL,
    TEMPLATE_ANNOTATION,
)
from spillway.operator.placement import Needs, Toleration

HEALTH_PORT = 8080
PEER_PORT = 7600
TOKEN_KEY, AUTHORITY_KEY, PEER_TOKEN_KEY = "token", "ca.crt", "peer-token"
INDEX_KEY, INDEX_AUTHORITY_KEY = "kv-index", "kv-index-ca.crt"
"""Keys of the agents' Secret."""
PEER_TLS_KEYS = ("tls.crt", "tls.key", "ca.crt")
_SECRETS, _PEER_TLS = "/etc/spillway", "/etc/spillway-peers"
INDEX_AUTHORITY_FILE = f"{_SECRETS}/{INDEX_AUTHORITY_KEY}"
_USER = 65532
_LOST_NODE_S = 30
"""How long a pod stays with a node that does not answer: as long as leases of lines live, about."""

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PodName:
    """Which agent of a deployment."""

    group: int
    generation: int

    def of(self, deployment: ModelDeployment) -> str:
        """The pod's name."""
        return f"{deployment.metadata.name}-{self.group}-{self.generation}"


def unsupported(deployment: ModelDeployment) -> str | None:
    """One sentence on what of the spec cannot be run yet, or None."""
    parallelism = deployment.spec.parallelism
    ranks = parallelism.tensor * parallelism.pipeline
    if ranks > 1:
        return (
            f"a replica over {ranks} ranks is not supported yet; set parallelism.tensor and parallelism.pipeline to 1"
        )
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
    """Of the headless service, and of the agents' Secret."""
    return f"{deployment.metadata.name}-agents"


def service(deployment: ModelDeployment) -> Manifest:
    """The headless service. Agents have a name in it before they are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(deployment, service_name(deployment), labels(deployment)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels(deployment),
            "ports": [{"name": "health", "port": HEALTH_PORT, "targetPort": "health", "protocol": "TCP"}],
        },
    }


def secret(deployment: ModelDeployment, entries: Mapping[str, bytes]) -> Manifest:
    """What agents must know and others must not, by key."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(deployment, service_name(deployment), labels(deployment)),
        "type": "Opaque",
        "data": {key: base64.b64encode(value).decode() for key, value in sorted(entries.items())},
    }


def pod(deployment: ModelDeployment, which: PodName, config: OperatorConfig) -> Manifest:
    """The agent of a group at a generation, held by the gate until its node is chosen.

    It never restarts in place: what started before and what starts now must differ in their generation.
    """
    name = which.of(deployment)
    own = labels(deployment) | {GROUP_LABEL: str(which.group), GENERATION_LABEL: str(which.generation)}
    about = metadata(deployment, name, own)
    about["annotations"] = {TEMPLATE_ANNOTATION: str(template(deployment, config))} | _store(deployment)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": _pod_spec(deployment, name, config)}


def template(deployment: ModelDeployment, config: OperatorConfig) -> int:
    """A digest of what agents are made from. The number of replicas is no part of it: scaling restarts nobody."""
    made_from = [_pod_spec(deployment, "", config), _store(deployment)]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def on_node(node: str) -> Manifest:
    """The node affinity that binds a gated pod to its node, and nowhere else."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    terms = {"nodeSelectorTerms": [{"matchFields": [field]}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _store(deployment: ModelDeployment) -> dict[str, str]:
    """The annotation that renews agents when their deployment turns to another KVStore."""
    return {} if deployment.spec.kv_store is None else {STORE_LABEL: deployment.spec.kv_store.name}


def _pod_spec(deployment: ModelDeployment, name: str, config: OperatorConfig) -> Manifest:
    spec, agents = deployment.spec, config.agents
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
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(deployment, name, config)],
        "volumes": [volume for volume, _ in _volumes(deployment, config)] + list(agents.volumes),
    }
    if agents.image_pull_secrets:
        body["imagePullSecrets"] = [{"name": each} for each in agents.image_pull_secrets]
    return body


def _volumes(deployment: ModelDeployment, config: OperatorConfig) -> list[tuple[Manifest, Manifest]]:
    """Our volumes, each with its mount."""
    spec = deployment.spec
    found: list[tuple[Manifest, Manifest]] = [
        ({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"})  # noqa: S108 - the pod's own
    ]
    if spec.kv.disk is not None:
        found.append(({"name": "kv", "emptyDir": {}}, {"name": "kv", "mountPath": "/kv"}))
    if spec.kv_store is not None or config.gateway.agent_token_file is not None or config.gateway.ca_file is not None:
        entries = {"secretName": service_name(deployment), "defaultMode": 0o440}
        mount = {"name": "gateway", "mountPath": _SECRETS, "readOnly": True}
        found.append(({"name": "gateway", "secret": entries}, mount))
    if spec.kv_store is not None and spec.kv_store.peer_tls is not None:
        items = [{"key": key, "path": key} for key in PEER_TLS_KEYS]
        entries = {"secretName": spec.kv_store.peer_tls.secret_name, "items": items, "defaultMode": 0o440}
        found.append(
            ({"name": "peer-tls", "secret": entries}, {"name": "peer-tls", "mountPath": _PEER_TLS, "readOnly": True})
        )
    is_folder = spec.model.startswith("/")
    if spec.model_volume is not None:
        claim = {"claimName": spec.model_volume.claim_name, "readOnly": is_folder}
        volume = {"name": "model", "persistentVolumeClaim": claim}
        found.append(
            (volume, {"name": "model", "mountPath": "/models" if is_folder else "/hub", "readOnly": is_folder})
        )
    elif not is_folder:
        found.append(({"name": "model", "emptyDir": {}}, {"name": "model", "mountPath": "/hub"}))
    return found


def _container(deployment: ModelDeployment, name: str, config: OperatorConfig) -> Manifest:
    spec, agents = deployment.spec, config.agents
    amounts = {"cpu": spec.resources.cpu, "memory": spec.resources.memory}
    limits = {"memory": spec.resources.memory}
    if spec.resources.gpus:
        amounts[GPU] = limits[GPU] = str(spec.resources.gpus)
    ports = [{"name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP"}]
    if spec.kv_store is not None:
        ports.append({"name": "peers", "containerPort": PEER_PORT, "protocol": "TCP"})
    return {
        "name": "agent",
        "image": agents.image,
        "imagePullPolicy": agents.image_pull_policy,
        "args": _arguments(deployment, name, config),
        "env": _environment(deployment) + list(agents.env),
        "ports": ports,
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
        "volumeMounts": [mount for _, mount in _volumes(deployment, config)] + list(agents.volume_mounts),
    }


def _environment(deployment: ModelDeployment) -> list[Manifest]:
    """Where things may be written, and what should not stand among the arguments."""
    found: list[Manifest] = [{"name": "HOME", "value": "/tmp"}]  # noqa: S108 - compiled kernels are kept there
    if not deployment.spec.model.startswith("/"):
        found.append({"name": "HF_HOME", "value": "/hub"})
    if deployment.spec.kv_store is not None:
        entry = {"name": service_name(deployment), "key": INDEX_KEY}
        found.append({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
        found.append({"name": "SPILLWAY_KV_INDEX", "valueFrom": {"secretKeyRef": entry}})
    return found


def _arguments(deployment: ModelDeployment, name: str, config: OperatorConfig) -> list[str]:
    spec, gateway = deployment.spec, config.gateway
    is_sharing = spec.kv_store is not None
    peer_tls = None if spec.kv_store is None else spec.kv_store.peer_tls
    said = {
        "model": spec.model,
        "gateway": gateway.address,
        "token-file": None if gateway.agent_token_file is None else f"{_SECRETS}/{TOKEN_KEY}",
        "tls-ca": None if gateway.ca_file is None else f"{_SECRETS}/{AUTHORITY_KEY}",
        "tls-server-name": None if gateway.ca_file is None else gateway.server_name,
        "served-model": deployment.metadata.name,
        # Namespace and generation in it: no two agents that share an index may have one name.
        "name": f"{deployment.metadata.namespace}/{name}",
        "health-listen": f"0.0.0.0:{HEALTH_PORT}",
        "grace": str(spec.grace_period_seconds),
        "device": _device(deployment, config),
        "block-tokens": str(spec.kv.block_tokens),
        "dtype": None if spec.kv.dtype == "auto" else spec.kv.dtype,
        "device-kv": _device_kv(deployment, config),
        "host-kv": spec.kv.host or "0",
        "disk-kv": spec.kv.disk,
        "disk-dir": None if spec.kv.disk is None else "/kv",
        "peer-listen": f"0.0.0.0:{PEER_PORT}" if is_sharing else None,
        "peer-address": f"$(POD_IP):{PEER_PORT}" if is_sharing else None,
        "peer-token-file": f"{_SECRETS}/{PEER_TOKEN_KEY}" if is_sharing else None,
    }
    if peer_tls is not None:
        said |= {
            f"peer-tls-{what}": f"{_PEER_TLS}/{file}"
            for what, file in zip(("cert", "key", "ca"), PEER_TLS_KEYS, strict=True)
        }
        said["peer-tls-name"] = peer_tls.server_name
    words = (f"--{option}={value}" for option, value in said.items() if value is not None)
    return ["agent", *words, *config.agents.args]


def _device(deployment: ModelDeployment, config: OperatorConfig) -> str:
    return config.agents.device or ("cuda" if deployment.spec.resources.gpus else "cpu")


def _device_kv(deployment: ModelDeployment, config: OperatorConfig) -> str | None:
    """Without a GPU the pool comes out of the pod's own memory, which the agent would take to be the whole node's."""
    spec = deployment.spec
    if spec.kv.device is not None or _device(deployment, config) != "cpu":
        return spec.kv.device
    return str(quantity_bytes(spec.resources.memory) // 4)


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
