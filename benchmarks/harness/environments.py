"""Virtual environments of the peers: made from `peers/environments.toml`, pinned, and reused.

A recipe that has been installed leaves `ready.json` (its digest and the frozen package list) in the environment;
a changed recipe makes it anew. An environment that fails to install leaves `failed.txt` with pip's last lines, so
that a benchmark can say so beside the other peers' figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent / "peers"
RECIPES = PEERS / "environments.toml"
LOCKS = PEERS / "locks"


class InstallError(RuntimeError):
    """A peer's environment could not be installed; the message holds the installer's last lines."""


@dataclass(frozen=True)
class Recipe:
    """What one environment holds (one table of `environments.toml`)."""

    name: str
    packages: tuple[str, ...]
    no_deps: tuple[str, ...] = ()
    on: str | None = None
    remove: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Name of this recipe's content, lock file included: an environment is reused while it stays the same."""
        lock = LOCKS / f"{self.name}.txt"
        parts = [sys.version, repr(self), lock.read_text() if lock.exists() else ""]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_recipes(path: Path = RECIPES) -> dict[str, Recipe]:
    """All recipes by name."""
    tables = tomllib.loads(path.read_text())
    return {
        name: Recipe(
            name=name,
            packages=tuple(t["packages"]),
            no_deps=tuple(t.get("no_deps", ())),
            on=t.get("on"),
            remove=tuple(t.get("remove", ())),
            env=t.get("env", {}),
        )
        for name, t in tables.items()
    }


class Environments:
    """The environments under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipes = read_recipes()

    def python(self, name: str) -> Path:
        """The interpreter of an environment, installing it first if need be.

        Raises:
            InstallError: it could not be installed, now or at an earlier try with the same recipe.
        """
        recipe = self.recipes[name]
        home = self.root / name
        ready, failed = home / "ready.json", home / "failed.txt"
        digest = recipe.digest()
        if ready.exists() and json.loads(ready.read_text())["digest"] == digest:
            return home / "bin" / "python"
        if failed.exists() and failed.read_text().startswith(digest):
            raise InstallError(failed.read_text()[len(digest) :].strip())
        base = self.python(recipe.on) if recipe.on else None
        shutil.rmtree(home, ignore_errors=True)
        try:
            self._install(recipe, home, base)
        except InstallError as error:
            failed.write_text(f"{digest}\n{error}\n")
            raise
        ready.write_text(json.dumps({"digest": digest, "packages": self._freeze(home)}, indent=1))
        return home / "bin" / "python"

    def packages(self, name: str) -> list[str]:
        """The frozen package list of an installed environment."""
        return list(json.loads((self.root / name / "ready.json").read_text())["packages"])

    def _install(self, recipe: Recipe, home: Path, base: Path | None) -> None:
        print(f"installing environment {recipe.name} …", file=sys.stderr, flush=True)
        _check([sys.executable, "-m", "venv", str(home)], {})
        python = home / "bin" / "python"
        if base is not None:
            site = "import site; print(site.getsitepackages()[0])"
            here = subprocess.run([python, "-c", site], check=True, capture_output=True, text=True).stdout.strip()
            there = subprocess.run([base, "-c", site], check=True, capture_output=True, text=True).stdout.strip()
            (Path(here) / "base.pth").write_text(there + "\n")
        lock = LOCKS / f"{recipe.name}.txt"
        pinned = ["-c", str(lock)] if lock.exists() else []
        pip = [str(python), "-m", "pip"]
        _check([*pip, "install", "-q", *pinned, *recipe.packages], recipe.env)
        if recipe.no_deps:
            _check([*pip, "install", "-q", "--no-deps", *recipe.no_deps], recipe.env)
        if recipe.remove:
            _check([*pip, "uninstall", "-q", "-y", *recipe.remove], recipe.env)

    def _freeze(self, home: Path) -> list[str]:
        command = [str(home / "bin" / "python"), "-m", "pip", "freeze"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]


def _check(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise InstallError(f"`{' '.join(command[1:6])} …` exited {done.returncode}: {tail}")
