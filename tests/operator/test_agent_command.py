"""The very command that the operator writes into a pod, run here with its paths put where this machine has them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from operated import SPILLWAY, GatewayProcess, config, free_port, lines

from spillway.api.resources import BatchJob, ModelDeployment
from spillway.kvstore.peer.tls import PeerTls
from spillway.operator.config import OperatorConfig
from spillway.operator.deployments import of_store
from spillway.operator.desired import agents
from spillway.operator.gateway import Gateway, TroubleError
from spillway.operator.kv_stores import Shared

PATIENCE_S = 120.0
TOKENS = {"client": "the-token-of-a-client", "agent": "the-token-of-an-agent"}
PEERS = b"sixteen bytes or more"


def until(true: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.1)
    return found


def deployment(**spec: Any) -> ModelDeployment:
    metadata = {"name": "tiny", "namespace": "team", "uid": "u-1", "generation": 1}
    kv = {"dtype": "float32", "device": "2Mi", "host": "4Mi", "disk": "16Mi"}
    spec = {"model": "/models/tiny", "resources": {"memory": "2Gi"}, "kv": kv, "gracePeriodSeconds": 20} | spec
    return ModelDeployment.read({"metadata": metadata, "spec": spec})


@pytest.fixture
def secured(tmp_path: Path, authority: Authority) -> Iterator[tuple[GatewayProcess, OperatorConfig]]:
    """A gateway that asks for tokens over TLS, and an operator that knows them."""
    pair = authority.certify("gateway")
    rows = [f"{hashlib.sha256(token.encode()).hexdigest()} default {kind}" for kind, token in TOKENS.items()]
    (tmp_path / "tokens").write_text("\n".join(rows))
    for kind, token in TOKENS.items():
        (tmp_path / f"{kind}-token").write_text(token)
    more = ("--tokens", tmp_path / "tokens", "--tls-cert", pair.certificate, "--tls-key", pair.key)
    gateway = GatewayProcess(tmp_path, *map(str, more))
    gateway.start()
    settings = {
        "address": gateway.address,
        "caFile": str(authority.certificate),
        "serverName": "localhost",
        "tokenFile": str(tmp_path / "client-token"),
        "agentTokenFile": str(tmp_path / "agent-token"),
    }
    yield gateway, config(gateway=settings)
    gateway.stop()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def redis(tmp_path: Path, authority: Authority) -> Iterator[int]:
    """It speaks TLS and nothing else."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server on PATH")
    port, pair = free_port(), authority.certify("redis")
    with (tmp_path / "redis.log").open("wb") as log:
        command = [program, "--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
        command += ["--tls-cert-file", str(pair.certificate), "--tls-key-file", str(pair.key)]
        command += ["--tls-ca-cert-file", str(authority.certificate)]
        command += ["--save", "", "--dir", str(tmp_path), "--requirepass", "hidden"]
        server = subprocess.Popen(command, stdout=log)
    yield port
    server.kill()
    server.wait()


class PodHere:
    """A kubelet's part: files of Secrets, variables, and a process; `ports` by the container's, `secrets` by name."""

    def __init__(self, pod: dict[str, Any], secrets: dict[str, dict[str, bytes]], folder: Path, model: Path) -> None:
        self.container = pod["spec"]["containers"][0]
        self.ports = {each["containerPort"]: free_port() for each in self.container["ports"]}
        self._folder, self._secrets = folder, secrets
        self._places = {"/models/tiny": str(model), "=/kv": f"={folder}/kv"}
        mounts = {each["name"]: each["mountPath"] for each in self.container["volumeMounts"]}
        for volume in pod["spec"]["volumes"]:
            here = folder / volume["name"]
            here.mkdir(parents=True)
            if "secret" in volume:
                for key, value in secrets[volume["secret"]["secretName"]].items():
                    (here / key).write_bytes(value)
                self._places[f"{mounts[volume['name']]}/"] = f"{here}/"
        self._places |= {f"0.0.0.0:{port}": f"127.0.0.1:{here}" for port, here in self.ports.items()}
        self._places |= {f"$(POD_IP):{port}": f"127.0.0.1:{here}" for port, here in self.ports.items()}

    def start(self) -> subprocess.Popen[bytes]:
        words = [self._here(word) for word in self.container["args"]]
        assert not any("0.0.0.0" in word or "$(" in word for word in words)
        environment = {each["name"]: self._value(each) for each in self.container["env"] if each["name"] != "HOME"}
        with (self._folder / "agent.log").open("ab") as log:
            return subprocess.Popen([*SPILLWAY, *words], env=os.environ | environment, stdout=log, stderr=log)

    def page(self, path: str) -> int:
        """The status; 0 while nothing listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[8080]}{path}", timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def _here(self, word: str) -> str:
        for there, here in self._places.items():
            word = word.replace(there, here)
        return word

    def _value(self, variable: dict[str, Any]) -> str:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "status.podIP"
            return "127.0.0.1"
        of = source["secretKeyRef"]
        return self._here(self._secrets[of["name"]][of["key"]].decode())


def test_the_pod_s_command_serves_lines_shares_blocks_and_stops(
    tmp_path: Path,
    secured: tuple[GatewayProcess, OperatorConfig],
    authority: Authority,
    redis: int,
    tiny_checkpoint: Callable[..., Path],
) -> None:
    _, settings = secured
    assert settings.gateway.ca_file is not None
    peer_tls = {"secretName": "agents-tls", "serverName": "localhost"}
    wanted = deployment(kvStore={"name": "blocks", "peerTls": peer_tls})
    shared = Shared(f"rediss://:hidden@127.0.0.1:{redis}/0".encode(), PEERS, authority.certificate.read_bytes())
    entries = {"token": TOKENS["agent"].encode(), "ca.crt": settings.gateway.ca_file.read_bytes()} | of_store(shared)
    held = agents.secret(wanted, entries)["data"]
    given = {key: base64.b64decode(value) for key, value in held.items()}
    pair = authority.certify("peers")
    files = dict(zip(agents.PEER_TLS_KEYS, (pair.certificate, pair.key, authority.certificate), strict=True))
    secrets = {"tiny-agents": given, "agents-tls": {key: file.read_bytes() for key, file in files.items()}}
    pod = PodHere(
        agents.pod(wanted, agents.PodName(0, 1), settings), secrets, tmp_path / "pod", tiny_checkpoint("llama")
    )
    process = pod.start()
    try:
        ready = pod.container["readinessProbe"]["httpGet"]["path"]
        until(lambda: process.poll() is not None or pod.page(ready) == 200, "the agent is ready")
        assert process.poll() is None, (tmp_path / "pod" / "agent.log").read_text()
        assert pod.page(pod.container["livenessProbe"]["httpGet"]["path"]) == 200
        assert asyncio.run(submitted_and_done(settings)) == 4
        asked = ["redis-cli", "-p", str(redis), "--tls", "--cacert", str(authority.certificate), "dbsize"]
        answer = subprocess.run(asked, env=os.environ | {"REDISCLI_AUTH": "hidden"}, capture_output=True, check=True)
        assert int(answer.stdout) > 0, "its blocks are in the index"
        context = PeerTls(*files.values(), name="localhost").client()
        with (
            socket.create_connection(("127.0.0.1", pod.ports[agents.PEER_PORT])) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as peer,
        ):
            assert peer.version() == "TLSv1.3", "others find its block server there"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


async def submitted_and_done(settings: OperatorConfig) -> int:
    """The operator's own way to the gateway; how many lines were answered."""
    metadata = {"name": "b", "namespace": "team", "uid": "uid-1"}
    wanted = BatchJob.read({"metadata": metadata, "spec": {"model": "tiny", "input": {"inline": lines(4)}}})
    async with Gateway(settings.gateway.target()) as gateway:
        job = await gateway.submit(wanted, lines(4).encode())
        assert (await gateway.find("uid-1", "2026-01-01T00:00:00Z")) is not None
        while (seen := await gateway.get(job.name)) is None or seen.state != "Completed":
            await asyncio.sleep(0.1)
    return seen.lines.completed


def test_a_gateway_that_refuses_is_told_in_its_words(
    tmp_path: Path, secured: tuple[GatewayProcess, OperatorConfig]
) -> None:
    _, settings = secured
    (tmp_path / "client-token").write_text("another-token")

    async def ask() -> None:
        async with Gateway(settings.gateway.target()) as gateway:
            await gateway.get("jobs/1")

    with pytest.raises(TroubleError, match="the gateway refuses: a valid bearer token is needed") as raised:
        asyncio.run(ask())
    assert not raised.value.trouble.is_final, "a token can be replaced"


def test_without_tokens_tls_or_store_nothing_is_mounted() -> None:
    pod = agents.pod(deployment(), agents.PodName(0, 1), config())
    assert [each["name"] for each in pod["spec"]["volumes"]] == ["tmp", "kv"]
    words = pod["spec"]["containers"][0]["args"]
    assert not [word for word in words if word.startswith(("--tls", "--token-file", "--peer"))]


@pytest.mark.parametrize(
    ("model", "volume", "mount"),
    [
        ("/models/m", {"claimName": "c"}, {"name": "model", "mountPath": "/models", "readOnly": True}),
        ("org/model", {"claimName": "c"}, {"name": "model", "mountPath": "/hub", "readOnly": False}),
        ("org/model", None, {"name": "model", "mountPath": "/hub"}),
        ("/models/m", None, None),
    ],
)
def test_where_a_model_comes_from(model: str, volume: dict[str, str] | None, mount: dict[str, Any] | None) -> None:
    wanted = deployment(model=model) if volume is None else deployment(model=model, modelVolume=volume)
    pod = agents.pod(wanted, agents.PodName(0, 1), config())
    container = pod["spec"]["containers"][0]
    assert next((each for each in container["volumeMounts"] if each["name"] == "model"), None) == mount
    assert {"name": "HF_HOME", "value": "/hub"} in container["env"] or model.startswith("/")
    names = {each["name"] for each in pod["spec"]["volumes"]}
    assert names == {each["name"] for each in container["volumeMounts"]}


def test_what_the_platform_gives_goes_into_every_pod_and_renews_it() -> None:
    volume = {"name": "torch", "hostPath": {"path": "/opt/torch"}}
    more = {"volumes": [volume], "volumeMounts": [{"name": "torch", "mountPath": "/opt/torch", "readOnly": True}]}
    given = config(agents=more | {"env": [{"name": "PYTHONPATH", "value": "/opt/torch"}], "device": "cpu"})
    pod = agents.pod(deployment(resources={"gpus": 1, "memory": "2Gi"}), agents.PodName(0, 1), given)
    assert volume in pod["spec"]["volumes"]
    container = pod["spec"]["containers"][0]
    assert more["volumeMounts"][0] in container["volumeMounts"]
    assert {"name": "PYTHONPATH", "value": "/opt/torch"} in container["env"]
    assert "--device=cpu" in container["args"]
    assert agents.template(deployment(), given) != agents.template(deployment(), config())
    assert agents.template(deployment(), given) == agents.template(deployment(replicas=3), given)
