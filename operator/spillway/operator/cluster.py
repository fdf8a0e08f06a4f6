"""The few calls to an API server that the operator makes, with the login that Kopf finds."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import kopf

from spillway.operator.errors import ConflictError, NotFoundError, RefusedError, UnreachableError
from spillway.operator.names import FIELD_MANAGER

Manifest = dict[str, Any]
_TIMEOUT_S = 30.0
_PLURALS = {
    "ModelDeployment": "/apis/spillway.dev/v1alpha1/namespaces/{}/modeldeployments",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Service": "/api/v1/namespaces/{}/services",
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


class Cluster:
    """An API server. Every method raises ClusterError, by what went wrong. `writes` counts what was sent."""

    def __init__(self) -> None:
        self.writes = 0

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        self._session = aiohttp.ClientSession(timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, key: Key) -> Manifest:
        """The object as it is now."""
        return await self._call("GET", key.path)

    async def list(self, path: str, selector: str = "") -> list[Manifest]:
        """All objects under a path, read from the server's store."""
        answer = await self._call("GET", path, query={"labelSelector": selector} if selector else None)
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
        self.writes += 1
        try:
            await self._call("DELETE", key.path)
        except NotFoundError:
            return

    async def _write(
        self, method: str, path: str, body: Manifest, content: str, query: dict[str, str] | None = None
    ) -> Manifest:
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
        server, headers, context = _login()
        try:
            async with self._session.request(
                method, server + path, params=query, data=body, headers=headers | {"Content-Type": content}, ssl=context
            ) as answer:
                text = await answer.text()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnreachableError(f"{method} {path}: {error or type(error).__name__}") from error
        if status < 300:
            found: Manifest = json.loads(text)
            return found
        message = f"{method} {path}: {status} {text[:500]}"
        raise {404: NotFoundError, 409: ConflictError}.get(status, RefusedError)(message)


def _login() -> tuple[str, dict[str, str], ssl.SSLContext]:
    """Anew for each call: tokens of service accounts are replaced within the hour."""
    settings = kopf.OperatorSettings()
    found = kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)
    if found is None:
        raise UnreachableError("no service account here and no kubeconfig")
    return found.server, dict(found.as_http_headers()), found.as_ssl_context()
