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
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
NODES = (*CONTROL_PLANE, "kubelet", "kube-proxy", "coredns", "podling")
_TOOLS = Path(__file__).parent.parent / "tools"
_BUILD_S = 1800  # the first one compiles Kubernetes: four minutes on two quiet cores, after a download of 400 MB


@dataclass(frozen=True)
class Source:
    """Where one program is built from: a tool module, and the package that is its command."""

    module: str
    package: str


def _source(name: str) -> Source:
    if name == "etcd":
        return Source("etcd", "go.etcd.io/etcd/server/v3")
    if name == "coredns":
        return Source("coredns", ".")
    if name == "podling":
        return Source("podling", ".")
    return Source("kubernetes", f"k8s.io/kubernetes/cmd/{name}")


def ensure(names: tuple[str, ...]) -> Path:
    """The folder that holds all programs `names`; builds what is missing.

    Raises:
        CannotRunHere: they are not there and there is no Go to build them.
        ClusterError: a build failed.
    """
    given = os.environ.get("KUBEBUILDER_ASSETS")
    if given and all(os.access(Path(given, name), os.X_OK) for name in names):
        return Path(given)
    folder = _cache_folder()
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


def _cache_folder() -> Path:
    """One folder for each set of pins, so that a changed go.sum never meets old programs."""
    pins = hashlib.sha256(KUBERNETES_VERSION.encode())
    for sums in sorted(_TOOLS.glob("*/go.sum")):
        pins.update(sums.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "spillway" / "cluster" / pins.hexdigest()[:16]


def _build(go: str, name: str, target: Path) -> None:
    if os.access(target, os.X_OK):  # another session built it while we waited for the lock
        return
    source = _source(name)
    fresh = target.with_suffix(".new")
    flags = "-s -w"
    if source.module == "kubernetes":  # without this the server reports no usable version
        flags += f" -X k8s.io/component-base/version.gitVersion={KUBERNETES_VERSION}"
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
