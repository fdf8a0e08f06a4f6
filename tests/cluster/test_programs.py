"""Programs come from KUBEBUILDER_ASSETS when it holds them all; without Go and without programs, a clear reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from testcluster import programs
from testcluster.errors import CannotRunHere


def _executable(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_given_programs_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    _executable(tmp_path / "etcd")
    assert programs.ensure(("etcd",)) == tmp_path


def test_half_a_set_is_not_mixed_with_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    _executable(tmp_path / "etcd")
    with pytest.raises(CannotRunHere, match=r"kube-apiserver.*no Go to build"):
        programs.ensure(("etcd", "kube-apiserver"))
