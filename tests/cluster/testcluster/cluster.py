"""A whole cluster: a control plane and N nodes, each in a network namespace of its own, joined by one bridge."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from testcluster import images, kernel, programs
from testcluster.control_plane import ControlPlane, Site
from testcluster.errors import CannotRunHere, ClusterError
from testcluster.ground import Ground
from testcluster.node import Node, NodePlan

_GATEWAY = "10.89.0.1"
_CONTROL = "10.89.0.10"
_SYSTEM_TOOLS = {  # command → Debian's package
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "sysctl": "procps",
}


def why_not_here() -> str | None:
    """What this machine lacks for a cluster with nodes, in one sentence; None if nothing."""
    if os.geteuid() != 0:
        return "a cluster with nodes needs root"
    missing = {package for command, package in _SYSTEM_TOOLS.items() if shutil.which(command) is None}
    if not Path("/usr/lib/cni/bridge").exists():
        missing.add("containernetworking-plugins")
    if missing:
        return f"missing programs (Debian: apt-get install {' '.join(sorted(missing))})"
    if not kernel.has_cgroup_v1():
        return "the recipe is for cgroup v1, and this machine has none"
    return None


class Cluster:
    """`nodes` are n1 … nN; each pretends to have `gpus_per_node` GPUs. One at a time on a machine (fixed addresses)."""

    def __init__(self, ground: Ground, node_count: int, gpus_per_node: int) -> None:
        if reason := why_not_here():
            raise CannotRunHere(reason)
        folder = programs.ensure(programs.NODES)
        self._ground = ground
        self.programs = folder
        self._gpus = gpus_per_node
        self._bridge = f"{ground.id}br"
        self.control_plane = ControlPlane(folder, ground, Site(_CONTROL, f"{ground.id}-cp"))
        plans = [NodePlan(number) for number in range(1, node_count + 1)]
        self.nodes = {plan.name: Node(plan, ground, folder, images.PODLING) for plan in plans}

    @property
    def mark(self) -> dict[str, str]:
        """Variables for a test's own processes, so that they do not outlive the cluster."""
        return self._ground.mark

    def start(self) -> None:
        """Returns when all nodes are Ready, have their GPUs, and names resolve.

        Raises:
            ClusterError: another cluster is up, a program ended, or something was not ready in time.
        """
        self._lay_network()
        self.control_plane.start()
        for node in self.nodes.values():
            node.write_configuration()
            node.start()
        archive = self._ground.folder / "podling.tar"
        images.write_archive(self.programs / "podling", archive)
        self._start_names()
        self.import_image(archive)
        self.wait_ready(*self.nodes)
        for name in self.nodes:
            self._pretend_gpus(name)

    def import_image(self, archive: Path) -> None:
        """Give all nodes the images of a docker-archive."""
        with ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(lambda node: node.import_image(archive), self.nodes.values()))

    def wait_ready(self, *names: str) -> None:
        """Returns when these nodes exist and are Ready."""
        targets = [f"node/{name}" for name in names]
        self.control_plane.kubectl("wait", "--for=create", "--timeout=90s", *targets)
        self.control_plane.kubectl("wait", "--for=condition=Ready", "--timeout=90s", *targets)

    def _lay_network(self) -> None:
        if any(Path("/sys/class/net").glob("g????????br")):
            raise ClusterError(
                "another test cluster is up on this machine (make cluster-down ends one of `make cluster`)"
            )
        kernel.add_bridge(self._bridge, f"{_GATEWAY}/24")
        namespaces = {f"{self._ground.id}-cp": _CONTROL}
        namespaces |= {f"{self._ground.id}-{name}": node.plan.address for name, node in self.nodes.items()}
        for namespace, address in namespaces.items():
            kernel.add_namespace(namespace, self._bridge, address, _GATEWAY)
        for plan in (node.plan for node in self.nodes.values()):
            route = ("route", "add", plan.pod_range, "via", plan.address)
            kernel.run("ip", *route)
            for namespace, address in namespaces.items():
                if address != plan.address:
                    kernel.run("ip", "-n", namespace, *route)

    def _pretend_gpus(self, name: str) -> None:
        """The documented way to advertise an extended resource; the kubelet keeps it."""
        paths = [f"/status/{kind}/nvidia.com~1gpu" for kind in ("capacity", "allocatable")]
        patch = json.dumps([{"op": "add", "path": path, "value": str(self._gpus)} for path in paths])
        self.control_plane.kubectl("patch", "node", name, "--subresource=status", "--type=json", "-p", patch)

    def _start_names(self) -> None:
        """CoreDNS beside the control plane, behind the cluster's DNS address."""
        corefile = self._ground.folder / "Corefile"
        corefile.write_text(f""".:53 {{
  bind {_CONTROL}
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {self.control_plane.kubeconfig} test
    pods insecure
  }}
  cache 5
}}
""")
        argv = [str(self.programs / "coredns"), "-conf", str(corefile)]
        self._ground.start("coredns", kernel.inside(f"{self._ground.id}-cp", argv))
        ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {"clusterIP": "10.96.0.10", "ports": ports},
        }
        endpoints = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "kube-dns-1",
                "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "addressType": "IPv4",
            "ports": ports,
            "endpoints": [{"addresses": [_CONTROL]}],
        }
        both = json.dumps({"apiVersion": "v1", "kind": "List", "items": [service, endpoints]})
        self.control_plane.kubectl("create", "-f", "-", stdin=both)
