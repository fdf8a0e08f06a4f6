"""A real control plane on loopback: etcd, API server, controller manager, scheduler. No nodes."""

from __future__ import annotations

import json
import secrets
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from testcluster import kernel
from testcluster.errors import ClusterError
from testcluster.ground import Ground

_READY_S = 60.0  # seconds in practice; this much where others use the machine
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "Metadata", "userGroups": ["system:serviceaccounts:spillway"]},
        {"level": "None", "verbs": ["get", "list", "watch"]},
        {"level": "None", "resources": [{"group": "coordination.k8s.io"}, {"group": "", "resources": ["events"]}]},
        {"level": "Metadata"},
    ],
}
_ISSUER = "https://kubernetes.default.svc"
_AS_ADMIN = {"kubeconfig": "kubeconfig", "leader-elect": "false", "secure-port": "0"}


@dataclass(frozen=True)
class Site:
    """Where a control plane lives: its address, and the network namespace that has it ("" is ours)."""

    address: str = "127.0.0.1"
    namespace: str = ""


class ControlPlane:
    """Serves at `url` for whoever holds `kubeconfig` (cluster administrator)."""

    def __init__(self, programs: Path, ground: Ground, site: Site = Site()) -> None:
        self._site = site
        self._programs = programs
        self._ground = ground
        self._token = secrets.token_urlsafe(24)
        self._port, self._etcd_port, self._peer_port = (6443, 2379, 2380) if site.namespace else _free_ports(3)
        self.url = f"https://{site.address}:{self._port}"
        self.kubeconfig = ground.folder / "kubeconfig"
        self._audit_log = ground.folder / "audit.log"

    def start(self) -> None:
        """Returns when the API server is ready and the controllers have made the first service account.

        Raises:
            ClusterError: a program ended, or was not ready in time.
        """
        certificates = self._ground.folder / "certs"
        certificates.mkdir()
        (certificates / "sa.key").write_bytes(_rsa_key())
        (self._ground.folder / "audit-policy.json").write_text(json.dumps(_AUDIT))
        (certificates / "tokens.csv").write_text(f"{self._token},admin,1,system:masters\n")
        self._start_etcd()
        self._start_api_server()
        self.wait(self._serves, "the API server is ready")
        self.kubeconfig.write_text(json.dumps(self._kubeconfig()))  # JSON is YAML
        self._start_controllers()
        self.wait(self._has_default_service_account, "the controllers work")

    def restart_api_server(self) -> None:
        """kill -9 of the API server, then a new one on the same port and data; returns when it is ready."""
        self._ground.kill("kube-apiserver")
        self._start_api_server()
        self.wait(self._serves, "the API server is ready again")

    def restart_controllers(self) -> None:
        """So that they know kinds that were made since: the garbage collector looks for new ones every 30 s only."""
        self._ground.kill("kube-controller-manager")
        self._start_manager()

    def audited(self, account: str | None = None) -> list[dict[str, Any]]:
        """Every write that the API server took or refused, of one account or of all: by whom, to what.

        Of accounts of the namespace `spillway` also what they read. The log is being written: the line that is not at
        its end is not among them. A call that was cut off before it was known whose it is has no account.
        """
        whole = self._audit_log.read_text().rpartition("\n")[0].splitlines()
        rows = [json.loads(line) for line in whole]
        return [row for row in rows if account is None or row["user"].get("username") == account]

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints.

        Raises:
            ClusterError: it exited non-zero; the message is what it wrote to standard error.
        """
        argv = [str(self._programs / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        flags = {
            "data-dir": "etcd",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "unsafe-no-fsync": "true",  # its data does not outlive a test
        }
        self._run("etcd", flags)

    def _start_api_server(self) -> None:
        flags = {
            "etcd-servers": f"http://127.0.0.1:{self._etcd_port}",
            "bind-address": self._site.address,
            "advertise-address": self._site.address,
            # loopback may not be an endpoint
            "endpoint-reconciler-type": "lease" if self._site.namespace else "none",
            "secure-port": str(self._port),
            "cert-dir": "certs",
            "service-account-key-file": "certs/sa.key",
            "service-account-signing-key-file": "certs/sa.key",
            "service-account-issuer": _ISSUER,
            "api-audiences": _ISSUER,
            "token-auth-file": "certs/tokens.csv",
            "authorization-mode": "Node,RBAC",
            "service-cluster-ip-range": "10.96.0.0/24",
            "allow-privileged": "true",
            "enable-admission-plugins": "OwnerReferencesPermissionEnforcement",  # as some distributions have it
            "audit-policy-file": "audit-policy.json",
            "audit-log-path": "audit.log",
            "kubelet-preferred-address-types": "InternalIP",
        }
        self._run("kube-apiserver", flags)

    def _start_controllers(self) -> None:
        self._start_manager()
        self._run("kube-scheduler", _AS_ADMIN)

    def _start_manager(self) -> None:
        manager = {
            "service-account-private-key-file": "certs/sa.key",
            "root-ca-file": "certs/apiserver.crt",
            "use-service-account-credentials": "true",
            "node-monitor-grace-period": "16s",  # four missed heartbeats of our kubelets
        }
        self._run("kube-controller-manager", _AS_ADMIN | manager)

    def _run(self, name: str, flags: dict[str, str]) -> None:
        argv = [str(self._programs / name), *(f"--{flag}={value}" for flag, value in flags.items())]
        self._ground.start(name, kernel.inside(self._site.namespace, argv))

    def _kubeconfig(self) -> dict[str, object]:
        authority = str(self._ground.folder / "certs" / "apiserver.crt")
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority": authority}}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }

    def _serves(self) -> bool:
        return self._get("/readyz") == 200

    def _has_default_service_account(self) -> bool:
        return self._get("/api/v1/namespaces/default/serviceaccounts/default") == 200

    def _get(self, path: str) -> int | None:
        """The HTTP status of a GET as administrator; None while nothing answers."""
        authority = self._ground.folder / "certs" / "apiserver.crt"
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self._token}"})
        try:
            context = ssl.create_default_context(cafile=authority)
            with urllib.request.urlopen(request, timeout=5, context=context) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:  # not listening yet, its certificate not written yet, or cut off while starting
            return None

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Returns once `condition` holds.

        Raises:
            ClusterError: a process of the ground ended, or it took too long.
        """
        deadline = time.monotonic() + _READY_S
        while not condition():
            self._ground.check_alive()
            if time.monotonic() > deadline:
                raise ClusterError(f"gave up waiting until {what} ({_READY_S:g} s)")
            time.sleep(0.05)


def _rsa_key() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
