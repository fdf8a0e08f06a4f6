"""What a cluster needs to take Spillway in: images, a volume, a model, our torch; and the answers to expect."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testcluster.builds import REDIS, REGISTRY, Builder
from testcluster.cluster import Cluster

from spillway.api.batch.v1 import batch_pb2
from spillway.api.client.batch import BatchClient
from spillway.api.client.target import Target, Tls

CHECKOUT = Path(__file__).parents[2]
# torch and transformers come from this machine: an image with them has 5 GB.
PARTS = {"operator": "operator", "gateway": "gateway", "agent": "rpc,metrics,redis"}
AGENT_USER = 65532
HOME_NODE = "n3"
"""Where operator and gateway run, so that a test can cut off another."""
_PATIENCE_S = 300.0


def until(true: Callable[[], bool], what: str) -> None:
    """Polls; the limit only keeps a defect from hanging the suite."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.5)


def values(checkpoint: Path, compiled: Path) -> dict[str, Any]:
    """Of the chart, for this cluster. `compiled`: where agents of all nodes keep their kernels; it becomes theirs."""
    os.chown(compiled, AGENT_USER, AGENT_USER)
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    home = {"kubernetes.io/hostname": HOME_NODE}
    python = str(Path(torch.origin).parents[1])
    sources = {"host-python": python, "checkpoints": str(checkpoint.parent), "cache": str(compiled)}
    places = {"host-python": "/opt/host-python", "checkpoints": "/models", "cache": "/cache"}
    variables = {"PYTHONPATH": places["host-python"], "XDG_CACHE_HOME": places["cache"]}
    variables["OMP_WAIT_POLICY"] = "PASSIVE"  # agents share two cores
    return {
        "image": {"registry": REGISTRY},
        "operator": {"nodeSelector": home},
        "gateway": {"persistence": {"size": "1Gi"}, "nodeSelector": home},
        "agents": {
            "device": "cpu",  # the GPUs are pretended
            "volumes": [{"name": name, "hostPath": {"path": path}} for name, path in sources.items()],
            "volumeMounts": [
                {"name": name, "mountPath": path, "readOnly": name != "cache"} for name, path in places.items()
            ],
            "env": [{"name": name, "value": value} for name, value in variables.items()],
        },
        "redis": {"image": REDIS},
    }


def provide(cluster: Cluster, folder: Path) -> None:
    """Images on all nodes, and one volume for whoever claims it first."""
    for archive in Builder(CHECKOUT).build(PARTS, folder):
        cluster.import_image(archive)
        archive.unlink()
    jobs = folder / "jobs"
    jobs.mkdir()
    jobs.chmod(0o777)  # a volume of a real driver is given to the pod's group instead
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "jobs"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "hostPath": {"path": str(jobs)},
        },
    }
    cluster.control_plane.kubectl("create", "-f", "-", stdin=json.dumps(volume))


def answers(content: bytes) -> dict[str, Any]:
    """By custom_id, less what differs from job to job: ids and times. Fails if a line has two results."""
    rows = [json.loads(row) for row in content.splitlines()]
    found = {row["custom_id"]: row["response"]["body"] for row in rows}
    assert len(found) == len(rows), "a line has two results"
    for body in found.values():
        body.pop("created")
        body.pop("id")
    return found


class Reference:
    """`spillway run` over many lines, beside whatever else the test waits for."""

    def __init__(self, checkpoint: Path, lines: list[dict[str, Any]], folder: Path, mark: dict[str, str]) -> None:
        source, self.output = folder / "reference.jsonl", folder / "reference-out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [sys.executable, "-m", "spillway.cli.main", "run", "--model", str(checkpoint), "--dtype", "float32"]
        command += ["--device", "cpu", "--host-kv", "512MiB", "--input", str(source), "--output", str(self.output)]
        self._log = folder / "reference.log"
        with self._log.open("wb") as log:
            environment = os.environ | mark | {"OMP_WAIT_POLICY": "PASSIVE"}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def answers(self) -> dict[str, Any]:
        """Waits for it."""
        assert self._process.wait(600) == 0, self._log.read_text()
        return answers(self.output.read_bytes())

    def end(self) -> None:
        """If it still runs."""
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Outside:
    """A client outside the cluster, with the files that the walk fetched."""

    folder: Path

    def job(self, name: str) -> batch_pb2.Job:
        """As it is now."""
        target = Target("localhost:7400", Tls(self.folder / "ca.crt"), self.folder / "token")

        async def call() -> batch_pb2.Job:
            async with BatchClient(target) as client:
                return await client.get(name)

        return asyncio.run(call())

    def completed(self, name: str) -> int:
        """Lines of a job that have their answer."""
        return int(self.job(name).lines.completed)


def kill_pod(name: str) -> None:
    """kill -9 of the processes in a pod, as the kernel does when memory runs out. The name is its hostname."""
    mark = f"HOSTNAME={name}".encode()
    killed = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or a process of the machine itself
            continue
        if mark in environment.split(b"\0"):
            os.kill(int(entry.name), signal.SIGKILL)
            killed += 1
    assert killed, f"nothing runs in {name}"
