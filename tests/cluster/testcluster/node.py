"""One node: kubelet, containerd with its CNI, and kube-proxy, in a network namespace of its own; and its faults."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testcluster import kernel
from testcluster.errors import ClusterError
from testcluster.ground import Ground

_PARTS = ("containerd", "kubelet", "kube-proxy")
_READY_S = 90.0


@dataclass(frozen=True)
class NodePlan:
    """A node's name (n1, n2, …) and its addresses."""

    number: int

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def address(self) -> str:
        return f"10.89.0.{20 + self.number}"

    @property
    def pod_range(self) -> str:
        return f"10.88.{self.number}.0/24"


class Node:
    """The programs of a node, and verbs for faults. Each verb returns when it is done; the cluster notices later."""

    def __init__(self, plan: NodePlan, ground: Ground, programs: Path, sandbox_image: str) -> None:
        self.plan = plan
        self.name = plan.name
        self._ground = ground
        self._programs = programs
        self._sandbox_image = sandbox_image
        self._scope = f"{ground.id}-{plan.name}"  # its network namespace, its link and its cgroups
        self._folder = ground.folder / plan.name

    def write_configuration(self) -> None:
        """The files that its programs read."""
        (self._folder / "cni").mkdir(parents=True)
        (self._folder / "cni" / "10-bridge.conflist").write_text(json.dumps(self._cni()))
        (self._folder / "containerd.toml").write_text(self._containerd())
        (self._folder / "kubelet.yaml").write_text(json.dumps(self._kubelet()))  # JSON is YAML

    def start(self) -> None:
        """Start what a node runs; also after `kill`, as a machine boots again.

        Raises:
            ClusterError: containerd does not come up.
        """
        kernel.add_cgroups(self._scope)
        kubelet = {
            "config": str(self._folder / "kubelet.yaml"),
            "kubeconfig": "kubeconfig",
            "hostname-override": self.name,
            "root-dir": str(self._folder / "kubelet"),
            "node-ip": self.plan.address,
            "cert-dir": str(self._folder / "pki"),
        }
        proxy = {
            "kubeconfig": "kubeconfig",
            "hostname-override": self.name,
            "proxy-mode": "nftables",
            "cluster-cidr": "10.88.0.0/16",
            "conntrack-max-per-core": "0",
        }
        self._run("containerd", ["containerd", "--config", str(self._folder / "containerd.toml")])
        self._until_containerd_listens()  # a kubelet that finds nobody ends, and here nothing starts it again
        self._run("kubelet", [str(self._programs / "kubelet"), *_flags(kubelet)])
        self._run("kube-proxy", [str(self._programs / "kube-proxy"), *_flags(proxy)])

    def import_image(self, archive: Path) -> None:
        """Give it the images of a docker-archive."""
        kernel.run("ctr", "--address", str(self._socket), "--namespace", "k8s.io", "images", "import", str(archive))

    def kill(self) -> None:
        """A power cut: kill -9 of everything, containers included. Its disk stays; mounts and run-time state go."""
        names = [f"{self.name}-{part}" for part in _PARTS]
        kernel.signal_all([self._ground.pid(name) for name in names], signal.SIGKILL)  # first, or they restart the rest
        self._ground.forget(names)
        kernel.signal_all(self._ground.processes_of(self.name), signal.SIGKILL)
        kernel.kill_cgroups(self._scope)
        kernel.unmount_below(self._folder)
        shutil.rmtree(self._folder / "state")
        self._socket.unlink()

    def freeze(self) -> None:
        """Everything on it stops running, and nothing is closed: the silent peer."""
        kernel.signal_all(self._everything(), signal.SIGSTOP)

    def thaw(self) -> None:
        """After `freeze`."""
        kernel.signal_all(self._everything(), signal.SIGCONT)

    def cut_off(self) -> None:
        """Its cable is pulled; all that runs on it goes on running."""
        kernel.run("ip", "link", "set", self._scope, "down")

    def bring_back(self) -> None:
        """After `cut_off`."""
        kernel.run("ip", "link", "set", self._scope, "up")

    @property
    def _socket(self) -> Path:
        return self._folder / "containerd.sock"

    def _until_containerd_listens(self) -> None:
        deadline = time.monotonic() + _READY_S
        with socket.socket(socket.AF_UNIX) as caller:
            while caller.connect_ex(str(self._socket)) != 0:
                self._ground.check_alive()
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"containerd of {self.name} does not listen: {self._ground.log(f'{self.name}-containerd')}"
                    )
                time.sleep(0.05)

    def _everything(self) -> set[int]:
        return {*self._ground.processes_of(self.name), *kernel.processes_in_cgroups(self._scope)}

    def _run(self, part: str, argv: Sequence[str]) -> None:
        self._ground.start(f"{self.name}-{part}", kernel.inside(self._scope, argv), node=self.name)

    def _cni(self) -> dict[str, object]:
        bridge = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": False,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self._folder / "ipam"),
                "ranges": [[{"subnet": self.plan.pod_range}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}

    def _containerd(self) -> str:
        """Without CAP_SYS_RESOURCE no oom score may sink: restrict_oom_score_adj, or sandboxes fail."""
        return f'''version = 2
root = "{self._folder}/root"
state = "{self._folder}/state"
[grpc]
  address = "{self._socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{self._sandbox_image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{self._folder}/cni"
[plugins."io.containerd.internal.v1.opt"]
  path = "{self._folder}/opt"
'''

    def _kubelet(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failSwapOn": False,
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._scope}",  # each its own, or kubelets kill each other's pods
            "enforceNodeAllocatable": [],
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "podLogsDir": str(self._folder / "podlogs"),
            "clusterDNS": ["10.96.0.10"],
            "clusterDomain": "cluster.local",
            "evictionHard": {},
            "localStorageCapacityIsolation": False,
            "nodeStatusUpdateFrequency": "4s",
        }


def _flags(values: dict[str, str]) -> list[str]:
    return [f"--{flag}={value}" for flag, value in values.items()]
