"""Spillway's images, built without a registry: a base by debootstrap, the parts by buildah. What is made is kept.

buildah's storage is a folder of our own in the cache; a build whose inputs have not changed takes a second.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from testcluster.errors import CannotRunHere, ClusterError
from testcluster.programs import cache

REGISTRY = "spillway.test"
REDIS = f"{REGISTRY}/base:12"
"""The base itself, which has a Redis: the operator brings its command."""
_BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates", "redis-server")
_UNUSED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists")
_CERTIFICATES = Path("/etc/ssl/certs")
_TIMEOUT_S = 900


def why_not_here() -> str | None:
    """What this machine lacks for building images, in one sentence; None if nothing."""
    if os.geteuid() != 0:
        return "images are built as root"
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    return f"missing programs (Debian: apt-get install {' '.join(missing)})" if missing else None


class Builder:
    """Builds the images of a checkout. One at a time on a machine: others wait."""

    def __init__(self, checkout: Path) -> None:
        if reason := why_not_here():
            raise CannotRunHere(reason)
        self._checkout = checkout
        self._folder = cache() / "images"

    def build(self, parts: Mapping[str, str], archive_folder: Path) -> list[Path]:
        """Archives of `REGISTRY/spillway-PART` by part, each with the extras it is to have, and of the base.

        `parts`: part → extras. The tag is the version of the chart. Raises ClusterError.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._ensure_base()
            names = {"base": REDIS}
            for part, extras in parts.items():
                names[part] = f"{REGISTRY}/spillway-{part}:0.1.0"
                self._build(names[part], extras)
            archives = []
            for part, name in names.items():
                archives.append(archive_folder / f"{part}.tar")
                self._buildah("push", name, f"docker-archive:{archives[-1]}:{name}")
        return archives

    def _build(self, name: str, extras: str) -> None:
        pip, downloads = self._folder / "pip.conf", self._folder / "pip"
        pip.write_text(_pip_settings())
        downloads.mkdir(exist_ok=True)
        self._buildah(
            "bud",
            "--isolation=chroot",
            "--network=host",
            "--layers",
            f"--build-arg=BASE={REDIS}",
            f"--build-arg=EXTRAS={extras}",
            f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro",
            f"--volume={pip}:/etc/pip.conf:ro",
            f"--volume={downloads}:/root/.cache/pip",
            f"--file={self._checkout / 'images' / 'Dockerfile'}",
            f"--tag={name}",
            str(self._checkout),
        )

    def _ensure_base(self) -> None:
        wanted = hashlib.sha256(" ".join(_BASE_PACKAGES).encode()).hexdigest()[:16]
        stamp = self._folder / "base"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        root = self._folder / "rootfs"
        shutil.rmtree(root, ignore_errors=True)
        _run("debootstrap", "--variant=minbase", f"--include={','.join(_BASE_PACKAGES)}", "bookworm", str(root))
        for each in _UNUSED:
            shutil.rmtree(root / each, ignore_errors=True)
        container = self._buildah("from", "scratch").strip()
        self._buildah("copy", "--quiet", container, str(root), "/")
        self._buildah("commit", "--quiet", "--rm", container, REDIS)
        shutil.rmtree(root)
        stamp.write_text(wanted)

    def _buildah(self, *arguments: str) -> str:
        storage = [f"--root={self._folder / 'storage'}", f"--runroot={self._folder / 'run'}"]
        return _run("buildah", *storage, *arguments)


def _pip_settings() -> str:
    """This machine's settings of pip, as a file."""
    given = {key.removeprefix("PIP_"): value for key, value in os.environ.items() if key.startswith("PIP_")}
    lines = [f"{key.lower().replace('_', '-')} = {value}" for key, value in given.items()]
    return "\n".join(["[global]", *lines, ""])


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(argv)}: {(done.stderr or done.stdout)[-3000:]}")
    return done.stdout
