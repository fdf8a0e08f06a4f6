"""A blocking client of a control plane: a kubectl for each call would cost more than what is tested."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from testcluster.control_plane import ControlPlane

Manifest = dict[str, Any]
PATIENCE_S = 60.0
_GROUPS = {
    "ModelDeployment": ("apis/spillway.dev/v1alpha1", "modeldeployments"),
    "BatchJob": ("apis/spillway.dev/v1alpha1", "batchjobs"),
    "KVStore": ("apis/spillway.dev/v1alpha1", "kvstores"),
    "CustomResourceDefinition": ("apis/apiextensions.k8s.io/v1", "customresourcedefinitions"),
    "StatefulSet": ("apis/apps/v1", "statefulsets"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
    "Pod": ("api/v1", "pods"),
    "Service": ("api/v1", "services"),
    "Secret": ("api/v1", "secrets"),
    "ConfigMap": ("api/v1", "configmaps"),
    "Node": ("api/v1", "nodes"),
    "Namespace": ("api/v1", "namespaces"),
}
OURS = ("BatchJob", "ModelDeployment", "KVStore")


class ApiError(Exception):
    """The API server refused."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kube:
    """One connection a thread. Objects of a namespace are looked at with `space`."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        config = json.loads(plane.kubeconfig.read_text())
        self._token = config["users"][0]["user"]["token"]
        self._context = ssl.create_default_context(cafile=config["clusters"][0]["cluster"]["certificate-authority"])
        self._address = urllib.parse.urlsplit(plane.url).netloc
        self._mine = threading.local()

    def call(self, method: str, path: str, body: Any = None, content: str = "application/json", **query: str) -> Any:
        url = f"/{path}?{urllib.parse.urlencode(query)}"
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": content}
        data = None if body is None else json.dumps(body)
        for attempt in range(3):
            connection = getattr(self._mine, "connection", None)
            if connection is None:
                connection = http.client.HTTPSConnection(self._address, timeout=60, context=self._context)
                self._mine.connection = connection
            try:
                connection.request(method, url, data, headers)
                answer = connection.getresponse()
                text = answer.read()
                break
            except (OSError, http.client.HTTPException):
                self.close()
                if attempt == 2:
                    raise
        if answer.status >= 300:
            raise ApiError(answer.status, text.decode(errors="replace"))
        return json.loads(text)

    def close(self) -> None:
        """This thread's connection."""
        connection = getattr(self._mine, "connection", None)
        if connection is not None:
            connection.close()
        self._mine.connection = None

    def get(self, kind: str, name: str, space: str = "") -> Manifest:
        found: Manifest = self.call("GET", _path(kind, space, name))
        return found

    def find(self, kind: str, name: str, space: str = "") -> Manifest | None:
        try:
            return self.get(kind, name, space)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: str, space: str = "") -> dict[str, Manifest]:
        items = self.call("GET", _path(kind, space))["items"]
        return {each["metadata"]["name"]: each for each in items}

    def create(self, manifest: Manifest, space: str = "", **query: str) -> Manifest:
        found: Manifest = self.call("POST", _path(manifest["kind"], space), manifest, **query)
        return found

    def apply(self, manifest: Manifest, space: str = "", **query: str) -> Manifest:
        path = _path(manifest["kind"], space, manifest["metadata"]["name"])
        query = {"fieldManager": "test", "force": "true"} | query
        found: Manifest = self.call("PATCH", path, manifest, "application/apply-patch+yaml", **query)
        return found

    def patch(self, kind: str, name: str, space: str, patch: Manifest, subresource: str = "") -> Manifest:
        path = _path(kind, space, name) + subresource
        found: Manifest = self.call("PATCH", path, patch, "application/merge-patch+json")
        return found

    def delete(self, kind: str, name: str, space: str = "", **options: Any) -> None:
        """No error where it is gone already."""
        try:
            self.call("DELETE", _path(kind, space, name), options or None)
        except ApiError as error:
            if error.status != 404:
                raise

    def wait(self, true: Callable[[], Any], what: str) -> Any:
        """Polls; returns what `true` found. The limit only keeps a defect from hanging the suite."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not (found := true()):
            assert time.monotonic() < deadline_s, f"never happened: {what}"
            time.sleep(0.05)
        return found

    def clean(self, space: str) -> None:
        """Ends what is in a namespace as far as others would notice: resources, finalizers, pods on nodes."""
        for kind in OURS:
            for name, each in self.list(kind, space).items():
                if each["metadata"].get("finalizers"):
                    self.patch(kind, name, space, {"metadata": {"finalizers": None}})
                self.delete(kind, name, space)
        self.call("DELETE", _path("StatefulSet", space))
        self.call("DELETE", _path("Pod", space), {"gracePeriodSeconds": 0})


def _path(kind: str, space: str, name: str = "") -> str:
    group, plural = _GROUPS[kind]
    where = f"{group}/namespaces/{space}/{plural}" if space else f"{group}/{plural}"
    return f"{where}/{name}" if name else where


def ours(kind: str, name: str, **spec: Any) -> Manifest:
    """A manifest of one of our kinds."""
    return {"apiVersion": "spillway.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def said(manifest: Manifest, condition: str) -> Manifest:
    """What the status says under one condition; nothing where it says nothing."""
    found = manifest.get("status", {}).get("conditions") or ()
    return next((each for each in found if each["type"] == condition), {})
