"""What was found of a KVStore to its status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spillway.api.resources import KVStore
from spillway.api.resources.kv_store import KVStoreStatus
from spillway.operator.desired.conditions import Finding, conditions, rfc3339
from spillway.operator.desired.kv_store import external_endpoint, redis_name, url, url_secret

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look found. `address`: the URL in the Secret, None if it is not there; `stateful_set` of a managed one."""

    address: str | None
    stateful_set: Manifest | None = None


def found_status(store: KVStore, seen: Seen, now_s: float) -> KVStoreStatus:
    """The status; the same as before where nothing changed."""
    name, key = url_secret(store)
    if store.spec.managed is not None:
        endpoint, finding = url(store), _managed(store, seen.stateful_set)
    else:
        endpoint = (external_endpoint(seen.address) if seen.address is not None else None) or ""
        finding = _external(seen.address, endpoint, name, key)
    generation = store.metadata.generation
    return KVStoreStatus(
        observed_generation=generation,
        endpoint=endpoint,
        url_secret=name,
        url_secret_key=key,
        conditions=conditions([finding], store.status.conditions, generation, rfc3339(now_s)),
    )


def _managed(store: KVStore, stateful_set: Manifest | None) -> Finding:
    status = {} if stateful_set is None else stateful_set.get("status", {})
    if status.get("readyReplicas", 0) >= 1:
        return Finding("Ready", holds=True, reason="RedisAnswers", message="Redis answers")
    pod = f"{redis_name(store)}-0"
    message = f"Redis does not answer yet; kubectl describe pod {pod} says what it waits for"
    return Finding("Ready", holds=False, reason="RedisNotReady", message=message)


def _external(address: str | None, endpoint: str, name: str, key: str) -> Finding:
    if address is None:
        return Finding("Ready", False, "SecretMissing", f"the Secret {name} does not exist, or has no key {key}")
    if not endpoint:
        return Finding("Ready", False, "NotAUrl", f"{key} of the Secret {name} is not a redis:// or rediss:// URL")
    return Finding("Ready", True, "UrlGiven", "its URL is known; whether Redis answers is seen by agents")
