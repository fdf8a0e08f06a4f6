"""One look at a KVStore, and what follows from it."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass

from spillway.api.resources import KVStore
from spillway.operator.cluster import Cluster, Key, Manifest, ensure, secret_value, tell_status
from spillway.operator.config import RedisSettings
from spillway.operator.desired import kv_store
from spillway.operator.desired.kv_store_status import Seen, found_status
from spillway.operator.errors import ConflictError, NotFoundError

log = logging.getLogger(__name__)

SECRET_RETRY_S = 10.0
"""How soon to look again for a Secret that somebody else has to make: we watch none."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What agents need to share blocks: the index's URL, the secret among themselves, the authority of the index."""

    index_url: bytes
    peer_token: bytes
    authority: bytes | None = None


@dataclass(frozen=True, slots=True)
class KVStores:
    """Carries out decisions on KVStores."""

    cluster: Cluster
    settings: RedisSettings

    async def reconcile(self, namespace: str, name: str, now_s: float) -> float | None:
        """Looks, decides, acts. Returns the Unix time to look again at the latest, or None. Raises ClusterError."""
        key = Key("KVStore", namespace, name)
        try:
            manifest = await self.cluster.get(key)
        except NotFoundError:
            return None  # the cluster deletes what it owned
        if "deletionTimestamp" in manifest["metadata"]:
            return None
        store = KVStore.read(manifest)
        if await self._value(namespace, kv_store.peers_name(store), kv_store.PEER_TOKEN_KEY) is None:
            await self._make(kv_store.peers_secret(store, secrets.token_urlsafe(32)))
        seen = await self._managed(store) if store.spec.managed is not None else await self._external(store)
        await tell_status(self.cluster, key, manifest, found_status(store, seen, now_s))
        return now_s + SECRET_RETRY_S if seen.address is None else None

    async def shared(self, namespace: str, name: str) -> Shared | str:
        """What agents need of this store, or one sentence on why they cannot have it yet."""
        try:
            store = KVStore.read(await self.cluster.get(Key("KVStore", namespace, name)))
        except NotFoundError:
            return f"the KVStore {name} does not exist"
        url_name, url_key = kv_store.url_secret(store)
        url = await self._value(namespace, url_name, url_key)
        token = await self._value(namespace, kv_store.peers_name(store), kv_store.PEER_TOKEN_KEY)
        if url is None or token is None:
            said = next((each.message for each in store.status.conditions if each.type == "Ready"), "")
            return f"the KVStore {name} has no URL yet" + (f": {said}" if url is None and said else "")
        authority = kv_store.authority_secret(store)
        trusted = None if authority is None else await self._value(namespace, authority, kv_store.AUTHORITY_KEY)
        return Shared(url.strip(), token, trusted)

    async def _managed(self, store: KVStore) -> Seen:
        namespace = store.metadata.namespace
        password = await self._value(namespace, kv_store.redis_name(store), kv_store.PASSWORD_KEY)
        if password is None:
            # Made once. Whoever was faster made the one that counts, so it is never overwritten.
            await self._make(kv_store.secret(store, secrets.token_urlsafe(32)))
        stateful_set = None
        for desired in kv_store.objects(store, self.settings):
            observed, was_written = await ensure(self.cluster, desired)
            if was_written:
                log.info("KVStore %s/%s: %s written", namespace, store.metadata.name, desired["kind"])
            if desired["kind"] == "StatefulSet":
                stateful_set = observed
        return Seen(kv_store.url(store), stateful_set)

    async def _external(self, store: KVStore) -> Seen:
        address = await self._value(store.metadata.namespace, *kv_store.url_secret(store))
        return Seen(None if address is None else address.decode(errors="replace"))

    async def _make(self, manifest: Manifest) -> None:
        """A Secret, unless it is there. Raises ConflictError where it is and lacks its key: then it is another's."""
        try:
            await self.cluster.create(manifest)
        except ConflictError as error:
            name = manifest["metadata"]["name"]
            raise ConflictError(f"the Secret {name} exists and is not ours, or was made just now: {error}") from error

    async def _value(self, namespace: str, name: str, key: str) -> bytes | None:
        return await secret_value(self.cluster, namespace, name, key)
