"""The pytest plugin: `control_plane`, `cluster` and `helm`, whose programs are built before any test's clock runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testcluster import programs
from testcluster.cluster import Cluster, why_not_here
from testcluster.control_plane import ControlPlane
from testcluster.errors import CannotRunHere
from testcluster.ground import Ground


def pytest_collection_finish(session: pytest.Session) -> None:
    """A first build takes minutes: not on the time of the test that happens to come first."""
    if session.config.option.collectonly:
        return
    wanted = {fixture for item in session.items for fixture in getattr(item, "fixturenames", ())}
    try:
        if "control_plane" in wanted:
            programs.ensure(programs.CONTROL_PLANE)
        if "cluster" in wanted and why_not_here() is None:
            programs.ensure(programs.NODES)
        if "helm" in wanted:
            programs.ensure(programs.HELM)
    except CannotRunHere:
        return  # the fixture skips with the reason


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """A real control plane without nodes, shared by the session: make a namespace of your own in it."""
    try:
        folder = programs.ensure(programs.CONTROL_PLANE)
    except CannotRunHere as reason:
        pytest.skip(str(reason))
    ground = Ground.open()
    try:
        plane = ControlPlane(folder, ground)
        plane.start()
        yield plane
    finally:
        ground.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A whole cluster of three nodes with two pretended GPUs each, shared by the session."""
    ground = Ground.open()
    try:
        try:
            whole = Cluster(ground, node_count=3, gpus_per_node=2)
        except CannotRunHere as reason:
            pytest.skip(str(reason))
        whole.start()
        yield whole
    finally:
        ground.close()


@pytest.fixture(scope="session")
def helm() -> Path:
    """The program."""
    try:
        return programs.ensure(programs.HELM) / "helm"
    except CannotRunHere as reason:
        pytest.skip(str(reason))
