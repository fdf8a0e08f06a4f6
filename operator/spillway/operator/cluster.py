"""The few calls to an API server that the operator makes, with the login that Kopf finds."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import aiohttp
import kopf

from spillway.api.resources.common import Part
from spillway.operator.desired.drift import holds
from spillway.operator.desired.events import news
from spillway.operator.errors import ClusterError, ConflictError, NotFoundError, RefusedError, UnreachableError
from spillway.operator.names import FIELD_MANAGER

log = logging.getLogger(__name__)

Manifest = dict[str, Any]
_TIMEOUT_S = 30.0
_LOGIN_S = 60.0
"""How long a login is used: tokens of service accounts are replaced within the hour."""
_UNAUTHORIZED, _BUSY, _TROUBLE = 401, 429, 500
_PLURALS = {
    "BatchJob": "/apis/spillway.dev/v1alpha1/namespaces/{}/batchjobs",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Event": "/api/v1/namespaces/{}/events",
    "KVStore": "/apis/spillway.dev/v1alpha1/namespaces/{}/kvstores",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "ModelDeployment": "/apis/spillway.dev/v1alpha1/namespaces/{}/modeldeployments",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "Service": "/api/v1/namespaces/{}/services",
    "StatefulSet": "/apis/apps/v1/namespaces/{}/statefulsets",
}


@dataclass(frozen=True, slots=True)
class Key:
    """Of a namespaced object."""

    kind: str
    namespace: str
    name: str

    @property
    def path(self) -> str:
        """Of its URL."""
        return f"{_PLURALS[self.kind].format(self.namespace)}/{self.name}"


@dataclass(frozen=True, slots=True)
class _Login:
    server: str
    headers: dict[str, str]
    context: ssl.SSLContext
    since_s: float


class Cluster:
    """An API server. Every method raises ClusterError, by what went wrong. `writes` counts what was sent.

    `may_write` is asked before each write, and raises where another operator may be acting by now.
    """

    def __init__(self, may_write: Callable[[], None] = lambda: None) -> None:
        self.writes = 0
        self._may_write = may_write
        self._login: _Login | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        agent = f"{FIELD_MANAGER}/{version('spillway')}"
        self._session = aiohttp.ClientSession(timeout=timeout, headers={"User-Agent": agent})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, key: Key) -> Manifest:
        """The object as it is now."""
        return await self._call("GET", key.path)

    async def list(self, path: str, **query: str) -> list[Manifest]:
        """All objects under a path, read from the server's store. `query`: selectors."""
        answer = await self._call("GET", path, query=query or None)
        items: list[Manifest] = answer["items"]
        return items

    async def create(self, manifest: Manifest) -> Manifest:
        """Raises ConflictError where the object exists."""
        metadata = manifest["metadata"]
        path = _PLURALS[manifest["kind"]].format(metadata["namespace"])
        return await self._write("POST", path, manifest, "application/json")

    async def apply(self, manifest: Manifest) -> Manifest:
        """Server-side, with our field manager, which takes what others set of these fields."""
        metadata = manifest["metadata"]
        path = Key(manifest["kind"], metadata["namespace"], metadata["name"]).path
        return await self._write("PATCH", path, manifest, "application/apply-patch+yaml", {"force": "true"})

    async def merge(self, key: Key, patch: Manifest, subresource: str = "") -> Manifest:
        """A merge patch. With a resourceVersion inside it raises ConflictError where somebody was faster."""
        return await self._write("PATCH", key.path + subresource, patch, "application/merge-patch+json")

    async def delete(self, key: Key) -> None:
        """No error where it is gone already."""
        self._may_write()
        self.writes += 1
        try:
            await self._call("DELETE", key.path)
        except NotFoundError:
            return

    async def _write(
        self, method: str, path: str, body: Manifest, content: str, query: dict[str, str] | None = None
    ) -> Manifest:
        self._may_write()
        self.writes += 1
        query = {"fieldManager": FIELD_MANAGER} | (query or {})
        return await self._call(method, path, query, json.dumps(body).encode(), content)

    async def _call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: bytes | None = None,
        content: str = "application/json",
    ) -> Manifest:
        login = self._logged_in()
        headers = login.headers | {"Content-Type": content}
        try:
            async with self._session.request(
                method, login.server + path, params=query, data=body, headers=headers, ssl=login.context
            ) as answer:
                text = await answer.text()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnreachableError(f"{method} {path}: {error or type(error).__name__}") from error
        if status < 300:
            found: Manifest = json.loads(text)
            return found
        if status == _UNAUTHORIZED:
            self._login = None
        message = f"{method} {path}: {status} {_reason(text)}"
        if status == _BUSY or status >= _TROUBLE:
            raise UnreachableError(message)
        raise {404: NotFoundError, 409: ConflictError}.get(status, RefusedError)(message)

    def _logged_in(self) -> _Login:
        if self._login is None or time.monotonic() - self._login.since_s > _LOGIN_S:
            self._login = _log_in(self._login)
        return self._login


def _log_in(former: _Login | None) -> _Login:
    settings = kopf.OperatorSettings()
    found = kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)
    if found is None:
        raise UnreachableError("no service account here and no kubeconfig")
    headers = dict(found.as_http_headers())
    # The same context as long as nothing changed: connections are kept by it.
    same = former is not None and (former.server, former.headers) == (found.server, headers)
    context = former.context if former is not None and same else found.as_ssl_context()
    return _Login(found.server, headers, context, time.monotonic())


def _reason(text: str) -> str:
    """The message in an answer of the API server, which is a Status in JSON."""
    try:
        said = json.loads(text)
    except ValueError:
        return text[:500]
    return str(said.get("message", text))[:500] if isinstance(said, dict) else text[:500]


async def secret_value(cluster: Cluster, namespace: str, name: str, key: str) -> bytes | None:
    """An entry of a Secret; None if there is no such Secret or entry. Raises ClusterError."""
    try:
        found = await cluster.get(Key("Secret", namespace, name))
        return base64.b64decode(found.get("data", {})[key], validate=True)
    except (NotFoundError, KeyError, binascii.Error):
        return None


async def secret_lacks(cluster: Cluster, namespace: str, name: str, keys: Iterable[str]) -> str | None:
    """One sentence on the first of these entries that a Secret lacks, None if it has all. Raises ClusterError."""
    try:
        held = (await cluster.get(Key("Secret", namespace, name))).get("data", {})
    except NotFoundError:
        held = {}
    lacking = next((key for key in keys if key not in held), None)
    return None if lacking is None else f"the Secret {name} does not exist, or has no key {lacking}"


async def ensure(cluster: Cluster, desired: Manifest) -> tuple[Manifest, bool]:
    """Writes an object only where it is not what it should be. Returns it, and whether it was written.

    Raises ClusterError.
    """
    metadata = desired["metadata"]
    try:
        observed = await cluster.get(Key(desired["kind"], metadata["namespace"], metadata["name"]))
    except NotFoundError:
        return await cluster.apply(desired), True
    return (observed, False) if holds(observed, desired) else (await cluster.apply(desired), True)


async def tell_status(cluster: Cluster, key: Key, manifest: Manifest, status: Part) -> bool:
    """Writes the status of `manifest` where it changed, and events of what turned. Returns whether it changed.

    Raises ConflictError where the object changed since it was read.
    """
    said = status.model_dump(by_alias=True, exclude_none=True, mode="json")
    former = manifest.get("status", {})
    if said == former:
        return False
    gone = {field: None for field in former if field not in said}
    metadata = {"resourceVersion": manifest["metadata"]["resourceVersion"]}
    await cluster.merge(key, {"metadata": metadata, "status": said | gone}, "/status")
    for event in news(manifest, said.get("conditions", ()), time.time()):
        try:
            await cluster.create(event)
        except ClusterError as error:  # an event is for people who look on: nothing depends on it
            log.warning("%s %s/%s: no event of it: %s", key.kind, key.namespace, key.name, error)
    return True
