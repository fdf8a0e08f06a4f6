"""KVStore to the Redis behind it: a password, a Service and a StatefulSet, or nothing where it is somebody else's.

The password is the one thing that is not a function of the spec: it is made once, by whoever calls, and then read back
from the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spillway.api.resources import KVStore, quantity_bytes
from spillway.api.resources.common import API_VERSION
from spillway.api.resources.kv_store import ManagedRedis
from spillway.operator.names import PREFIX

PORT = 6379
STORE_LABEL = f"{PREFIX}/kv-store"
RESERVE = 1.5
"""Memory of the container over `maxmemory`: copy-on-write while a snapshot is taken, buffers, fragmentation."""
_USER = 999
_DATA = "/data"

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RedisImage:
    """What to run, from the operator's settings."""

    name: str
    pull_policy: str = "IfNotPresent"


def url_secret(store: KVStore) -> tuple[str, str]:
    """Name and key of the Secret that holds the URL for agents."""
    if store.spec.external is not None:
        return store.spec.external.url_secret.name, store.spec.external.url_secret.key
    return _name(store), "url"


def secret(store: KVStore, password: str) -> Manifest:
    """The Secret of a managed store. `password`: URL-safe characters only."""
    url = f"redis://:{password}@{_name(store)}.{store.metadata.namespace}.svc:{PORT}/0"
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(store),
        "type": "Opaque",
        "stringData": {"password": password, "url": url},
    }


def objects(store: KVStore, image: RedisImage) -> list[Manifest]:
    """Service and StatefulSet of a managed store; nothing for an external one."""
    managed = store.spec.managed
    if managed is None:
        return []
    return [_service(store), _stateful_set(store, managed, image)]


def _service(store: KVStore) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(store),
        "spec": {
            "clusterIP": "None",
            "selector": _labels(store),
            "ports": [{"name": "redis", "port": PORT, "targetPort": "redis", "protocol": "TCP"}],
        },
    }


def _stateful_set(store: KVStore, managed: ManagedRedis, image: RedisImage) -> Manifest:
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(managed, image)],
        "volumes": [
            {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {
                "name": "secret",
                "secret": {"secretName": _name(store), "items": [{"key": "password", "path": "password"}]},
            },
        ],
    }
    spec: Manifest = {
        "serviceName": _name(store),
        "replicas": 1,
        "selector": {"matchLabels": _labels(store)},
        "template": {"metadata": {"labels": _labels(store)}, "spec": pod},
    }
    if managed.storage is None:
        pod["volumes"].append({"name": "data", "emptyDir": {}})
    else:
        claim: Manifest = {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": managed.storage}},
        }
        if managed.storage_class_name is not None:
            claim["storageClassName"] = managed.storage_class_name
        spec["volumeClaimTemplates"] = [{"metadata": {"name": "data"}, "spec": claim}]
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": _metadata(store), "spec": spec}


def _container(managed: ManagedRedis, image: RedisImage) -> Manifest:
    memory_bytes = quantity_bytes(managed.memory)
    # The password goes in by a file in memory: arguments and environments can be read by whoever sees the processes.
    # `exec` makes Redis the container's first process, so that it gets the SIGTERM and saves.
    settings = (
        f"port {PORT}\ndir {_DATA}\nmaxmemory {memory_bytes}\nmaxmemory-policy noeviction\n"
        f"appendonly {'yes' if managed.storage else 'no'}\nsave ''\n"
    )
    script = (
        'umask 077; { printf "%s" "$SETTINGS"; printf "requirepass %s\\n" "$(cat /secret/password)"; }'
        " > /run/redis/redis.conf && exec redis-server /run/redis/redis.conf"
    )
    check = 'REDISCLI_AUTH="$(cat /secret/password)" redis-cli -p 6379 ping | grep -q PONG'
    probe = {"exec": {"command": ["sh", "-c", check]}, "periodSeconds": 5, "timeoutSeconds": 3}
    return {
        "name": "redis",
        "image": image.name,
        "imagePullPolicy": image.pull_policy,
        "command": ["sh", "-c", script],
        "env": [{"name": "SETTINGS", "value": settings}],
        "ports": [{"name": "redis", "containerPort": PORT, "protocol": "TCP"}],
        "readinessProbe": probe,
        "livenessProbe": {**probe, "failureThreshold": 6},
        "resources": {
            "requests": {"cpu": "100m", "memory": str(memory_bytes)},
            "limits": {"memory": str(int(memory_bytes * RESERVE) + (32 << 20))},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "data", "mountPath": _DATA},
            {"name": "secret", "mountPath": "/secret"},
            {"name": "run", "mountPath": "/run/redis"},
        ],
    }


def _name(store: KVStore) -> str:
    return f"{store.metadata.name}-redis"


def _labels(store: KVStore) -> dict[str, str]:
    return {"app.kubernetes.io/name": "spillway-redis", STORE_LABEL: store.metadata.name}


def _metadata(store: KVStore) -> Manifest:
    """Owned by the store, so that the cluster itself cleans up, with or without an operator."""
    return {
        "name": _name(store),
        "namespace": store.metadata.namespace,
        "labels": _labels(store),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": "KVStore",
                "name": store.metadata.name,
                "uid": store.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
