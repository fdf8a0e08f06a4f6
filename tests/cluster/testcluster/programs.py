"""The programs of a cluster: from KUBEBUILDER_ASSETS, else from our cache, else built from the pinned tool modules."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from testcluster.errors import CannotRunHere, ClusterError

KUBERNETES_VERSION = "v1.36.3"  # as in tools/kubernetes/go.mod
HELM_VERSION = "v4.3.1"  # as in tools/helm/go.mod
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
NODES = (*CONTROL_PLANE, "kubelet", "kube-proxy", "coredns", "podling")
HELM = ("helm",)
_TOOLS = Path(__file__).parent.parent / "tools"
_BUILD_S = 1800  # the first one compiles Kubernetes: four minutes on two quiet cores, after a download of 400 MB


@dataclass(frozen=True)
class Source:
    """Where one program is built from: a tool module, the package that is its command, a variable for its version.

    Without that variable the programs report no usable version.
    """

    module: str
    package: str
    version: str = ""


def _source(name: str) -> Source:
    if name == "etcd":
        return Source("etcd", "go.etcd.io/etcd/server/v3")
    if name == "coredns":
        return Source("coredns", ".")
    if name == "podling":
        return Source("podling", ".")
    if name == "helm":
        return Source("helm", "helm.sh/helm/v4/cmd/helm", f"helm.sh/helm/v4/internal/version.version={HELM_VERSION}")
    version = f"k8s.io/component-base/version.gitVersion={KUBERNETES_VERSION}"
    return Source("kubernetes", f"k8s.io/kubernetes/cmd/{name}", version)


def ensure(names: tuple[str, ...]) -> Path:
    """The folder that holds all programs `names`, of a cluster or HELM; builds what is missing.

    Raises:
        CannotRunHere: they are not there and there is no Go to build them.
        ClusterError: a build failed.
    """
    given = os.environ.get("KUBEBUILDER_ASSETS")
    if given and all(os.access(Path(given, name), os.X_OK) for name in names):
        return Path(given)
    folder = _cache_folder(names)
    missing = [name for name in names if not os.access(folder / name, os.X_OK)]
    if missing:
        go = shutil.which("go")
        if go is None:
            raise CannotRunHere(
                f"{', '.join(missing)}: not in KUBEBUILDER_ASSETS, nor built before, and no Go to build"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in missing:
                _build(go, name, folder / name)
    return folder


def _cache_folder(names: tuple[str, ...]) -> Path:
    """One folder for each set of pins, so that a changed go.sum never meets old programs; helm's pins are its own."""
    kind, modules, version = ("cluster", ("coredns", "etcd", "kubernetes"), KUBERNETES_VERSION)
    if names == HELM:
        kind, modules, version = ("helm", ("helm",), HELM_VERSION)
    pins = hashlib.sha256(version.encode())
    for module in modules:
        pins.update((_TOOLS / module / "go.sum").read_bytes())
    return cache() / kind / pins.hexdigest()[:16]


def cache() -> Path:
    """Where what takes long to make is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spillway"


def _build(go: str, name: str, target: Path) -> None:
    if os.access(target, os.X_OK):  # another session built it while we waited for the lock
        return
    source = _source(name)
    fresh = target.with_suffix(".new")
    flags = "-s -w"
    if source.version:
        flags += f" -X {source.version}"
    done = subprocess.run(
        [go, "build", "-trimpath", "-ldflags", flags, "-o", str(fresh), source.package],
        cwd=_TOOLS / source.module,
        env=os.environ | {"CGO_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=_BUILD_S,
        check=False,
    )
    if done.returncode != 0:
        raise ClusterError(f"go build of {name} failed: {done.stderr[-2000:]}")
    fresh.rename(target)
