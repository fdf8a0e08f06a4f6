"""KVStore to the Redis behind it: a password, a Service and a StatefulSet, or nothing where it is somebody else's.

The password is the one thing that is not a function of the spec: it is made once, by whoever calls, and then read back
from the cluster.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from spillway.api.resources import KVStore, quantity_bytes
from spillway.api.resources.kv_store import ManagedRedis
from spillway.operator.config import RedisSettings
from spillway.operator.desired.owned import metadata
from spillway.operator.names import STORE_LABEL

PORT = 6379
PASSWORD_KEY, URL_KEY, PEER_TOKEN_KEY, AUTHORITY_KEY = "password", "url", "peer-token", "ca.crt"
RESERVE = 1.5
"""Memory of the container over `maxmemory`: copy-on-write while a snapshot is taken, buffers, fragmentation."""
_SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster")
_USER = 999
_DATA = "/data"
_TLS_FILES = {"tls-cert-file": "tls.crt", "tls-key-file": "tls.key", "tls-ca-cert-file": AUTHORITY_KEY}

Manifest = dict[str, Any]


def url_secret(store: KVStore) -> tuple[str, str]:
    """Name and key of the Secret that holds the URL for agents."""
    if store.spec.external is not None:
        return store.spec.external.url_secret.name, store.spec.external.url_secret.key
    return redis_name(store), "url"


def authority_secret(store: KVStore) -> str | None:
    """Name of the Secret whose `ca.crt`, if it has one, is the authority of the store's Redis."""
    if store.spec.external is not None:
        return store.spec.external.url_secret.name
    tls = None if store.spec.managed is None else store.spec.managed.tls
    return None if tls is None else tls.secret_name


def trusting(address: bytes, authority_file: str) -> bytes:
    """A Redis URL that trusts the authority in a file, where it speaks TLS and names no authority itself."""
    if not address.startswith(b"rediss") or b"ssl_ca_certs=" in address:
        return address
    return address + (b"&" if b"?" in address else b"?") + f"ssl_ca_certs={authority_file}".encode()


def url(store: KVStore, password: str = "") -> str:
    """Of a managed store's Redis; without credentials where `password` is empty. It must be safe in a URL."""
    credentials = f":{password}@" if password else ""
    scheme = "redis" if store.spec.managed is None or store.spec.managed.tls is None else "rediss"
    return f"{scheme}://{credentials}{redis_name(store)}.{store.metadata.namespace}.svc:{PORT}/0"


def external_endpoint(address: str) -> str | None:
    """A Redis URL without its credentials; None if it is none."""
    try:
        found = urlsplit(address)
        host, port = found.hostname, found.port or PORT
    except ValueError:
        return None
    if found.scheme not in _SCHEMES or not host:
        return None
    return f"{found.scheme}://{f'[{host}]' if ':' in host else host}:{port}{found.path}"


def secret(store: KVStore, password: str) -> Manifest:
    """The Secret of a managed store. `password`: URL-safe characters only."""
    return _secret(store, redis_name(store), {PASSWORD_KEY: password, URL_KEY: url(store, password)})


def peers_secret(store: KVStore, token: str) -> Manifest:
    """What agents that find each other through this store prove to each other that they may."""
    return _secret(store, peers_name(store), {PEER_TOKEN_KEY: token})


def objects(store: KVStore, redis: RedisSettings) -> list[Manifest]:
    """Service and StatefulSet of a managed store; nothing for an external one."""
    managed = store.spec.managed
    if managed is None:
        return []
    return [_service(store), _stateful_set(store, managed, redis)]


def redis_name(store: KVStore) -> str:
    """Of everything that a managed store's Redis is made of."""
    return f"{store.metadata.name}-redis"


def peers_name(store: KVStore) -> str:
    """Of the Secret that agents share among themselves."""
    return f"{store.metadata.name}-peers"


def _secret(store: KVStore, name: str, entries: dict[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(store, name, _labels(store)),
        "type": "Opaque",
        "stringData": entries,
    }


def _service(store: KVStore) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(store, redis_name(store), _labels(store)),
        "spec": {
            "clusterIP": "None",
            "selector": _labels(store),
            "ports": [{"name": "redis", "port": PORT, "targetPort": "redis", "protocol": "TCP"}],
        },
    }


def _stateful_set(store: KVStore, managed: ManagedRedis, redis: RedisSettings) -> Manifest:
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(managed, redis)],
        "volumes": [
            {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {
                "name": "secret",
                "secret": {"secretName": redis_name(store), "items": [{"key": "password", "path": "password"}]},
            },
        ],
    }
    spec: Manifest = {
        "serviceName": redis_name(store),
        "replicas": 1,
        "selector": {"matchLabels": _labels(store)},
        "template": {"metadata": {"labels": _labels(store)}, "spec": pod},
    }
    if managed.tls is not None:
        items = [{"key": key, "path": key} for key in _TLS_FILES.values()]
        pod["volumes"].append({"name": "tls", "secret": {"secretName": managed.tls.secret_name, "items": items}})
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
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": metadata(store, redis_name(store), _labels(store)),
        "spec": spec,
    }


def _container(managed: ManagedRedis, redis: RedisSettings) -> Manifest:
    memory_bytes = quantity_bytes(managed.memory)
    # The password goes in by a file in memory: arguments and environments can be read by whoever sees the processes.
    # `exec` makes Redis the container's first process, so that it gets the SIGTERM and saves.
    settings = (
        f"{_listening(managed)}dir {_DATA}\nmaxmemory {memory_bytes}\nmaxmemory-policy noeviction\n"
        f"appendonly {'yes' if managed.storage else 'no'}\nsave ''\n"
    )
    script = (
        'umask 077; { printf "%s" "$SETTINGS"; printf "requirepass %s\\n" "$(cat /secret/password)"; }'
        " > /run/redis/redis.conf && exec redis-server /run/redis/redis.conf"
    )
    secure = "" if managed.tls is None else " --tls --cacert /tls/ca.crt"
    check = f'REDISCLI_AUTH="$(cat /secret/password)" redis-cli -p {PORT}{secure} ping | grep -q PONG'
    probe = {"exec": {"command": ["sh", "-c", check]}, "periodSeconds": 5, "timeoutSeconds": 3}
    return {
        "name": "redis",
        "image": redis.image,
        "imagePullPolicy": redis.image_pull_policy,
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
            *([] if managed.tls is None else [{"name": "tls", "mountPath": "/tls"}]),
        ],
    }


def _listening(managed: ManagedRedis) -> str:
    """Where Redis listens, as lines of its settings. Whoever has the password needs no certificate."""
    if managed.tls is None:
        return f"port {PORT}\n"
    files = "".join(f"{option} /tls/{file}\n" for option, file in _TLS_FILES.items())
    return f"port 0\ntls-port {PORT}\n{files}tls-auth-clients no\n"


def _labels(store: KVStore) -> dict[str, str]:
    return {"app.kubernetes.io/name": "spillway-redis", STORE_LABEL: store.metadata.name}
