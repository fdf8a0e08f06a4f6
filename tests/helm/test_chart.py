"""The chart: what it refuses, what it renders, and that a real API server takes every object of it."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from cryptography import x509
from testcluster.control_plane import ControlPlane

from spillway.api.resources import ModelDeployment
from spillway.cli.main import app
from spillway.gateway.service.access import Access, Kind
from spillway.gateway.service.limits import Limits, TenantLimits
from spillway.operator.config import OperatorConfig
from spillway.operator.desired.agents import PodName
from spillway.operator.desired.agents import pod as agent_pod

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "spillway"
PAGE = ROOT / "docs" / "kubernetes.md"
Render = Callable[..., list[dict[str, Any]]]
DEPLOYMENT = {"metadata": {"name": "m", "namespace": "team", "uid": "u"}, "spec": {"model": "/models/m"}}
SETTINGS = {"gateway": {"address": "gateway:7400"}, "agents": {"image": "agent"}, "redis": {"image": "redis"}}

EVERYTHING: dict[str, Any] = {
    "image": {"registry": "registry.test/team", "tag": "1.2.3", "pullPolicy": "Always", "pullSecrets": ["pull"]},
    "operator": {
        "replicas": 2,
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "k", "operator": "Exists", "effect": "NoSchedule"}],
    },
    "gateway": {
        "image": "registry.test/gateway@sha256:" + "0" * 64,
        "maxInput": "8GiB",
        "http": {"enabled": True, "port": 8443},
        "limits": {
            "default": {"jobs": 100, "lines": 10_000_000, "inputBytes": 1_000_000_000_000, "callsPerSecond": 50},
            "tenants": {"team.a": {"weight": 2.5}},
        },
        "retention": "30d",
        "inputSources": ["file:///inputs/", "s3://bucket/batches/"],
        "extraArgs": ["--tls-client-ca=/etc/spillway/tls/ca.crt"],
        "volumes": [{"name": "inputs", "persistentVolumeClaim": {"claimName": "inputs", "readOnly": True}}],
        "volumeMounts": [{"name": "inputs", "mountPath": "/inputs", "readOnly": True}],
        "env": [{"name": "AWS_REGION", "value": "eu-1"}],
        "serviceAccount": "gateway",
        "service": {"type": "LoadBalancer", "port": 443, "annotations": {"a": "b"}},
        "persistence": {"size": "1Ti", "storageClassName": "fast"},
        "tls": {"names": ["batch.test"]},
        "tokens": ["0" * 64 + " team client"],
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "k", "operator": "Equal", "value": "v"}],
    },
    "agents": {
        "device": "cpu",
        "volumes": [{"name": "models", "hostPath": {"path": "/models"}}],
        "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
        "env": [{"name": "A", "value": "B"}],
        "extraArgs": ["--max-lines=64"],
    },
    "redis": {"enabled": True, "storage": "1Gi"},
    "test": {"model": "smollm2", "digest": "0" * 64},
}


def template(helm: Path, values: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
    command = [str(helm), "template", "spillway", str(CHART), "--namespace=chart", "--values=-", *more]
    return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def render(helm: Path) -> Render:
    def objects(values: dict[str, Any] | None = None, *more: str) -> list[dict[str, Any]]:
        done = template(helm, values or {}, *more)
        assert done.returncode == 0, done.stderr
        return [each for each in yaml.safe_load_all(done.stdout) if each]

    return objects


def one(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def test_its_crds_are_those_of_the_manifests(render: Render) -> None:
    crds = [each for each in render({}, "--include-crds") if each["kind"] == "CustomResourceDefinition"]
    manifests = [yaml.safe_load(file.read_text()) for file in (ROOT / "manifests" / "crds").glob("*.yaml")]
    assert {each["metadata"]["name"]: each for each in crds} == {each["metadata"]["name"]: each for each in manifests}


def test_the_schema_knows_each_value_and_no_other() -> None:
    def keys(schema: dict[str, Any]) -> Any:
        return {key: keys(each) for key, each in schema.get("properties", {}).items()}

    def given(value: Any, schema: dict[str, Any]) -> Any:
        if not isinstance(value, dict) or "properties" not in schema:
            return {}
        return {key: given(each, schema["properties"].get(key, {})) for key, each in value.items()}

    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    resources = {"cpu": {}, "memory": {}, "ephemeral-storage": {}}
    expected = keys(schema)
    found = given(values, schema)
    for part in ("operator", "gateway"):
        assert expected[part].pop("resources") == {"requests": resources, "limits": resources}
        found[part].pop("resources")
    assert set(schema["definitions"]["limits"]["properties"]) == {
        "jobs",
        "lines",
        "inputBytes",
        "callsPerSecond",
        "weight",
    }
    assert found["gateway"].pop("limits") == {"default": {}, "tenants": {}}
    assert set(expected["gateway"].pop("limits")) == {"default", "tenants"}
    assert found == expected


def test_it_lints(helm: Path) -> None:
    done = subprocess.run(
        [str(helm), "lint", "--strict", str(CHART)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("values", "at_fault"),
    [
        ({"gatway": {}}, "gatway"),
        ({"gateway": {"persistance": {"size": "1Gi"}}}, "persistance"),
        ({"gateway": {"service": {"port": "7400"}}}, "port"),
        ({"gateway": {"persistence": {"size": "much"}}}, "size"),
        ({"gateway": {"tokens": ["secret default client"]}}, "tokens"),
        ({"agents": {"device": "tpu"}}, "device"),
        ({"gateway": {"limits": {"default": {"job": 3}}}}, "job"),
        ({"gateway": {"limits": {"tenants": {"a b": {}}}}}, "a b"),
        ({"gateway": {"retention": "a month"}}, "retention"),
        ({"gateway": {"inputSources": ["/srv"]}}, "inputSources"),
        ({"operator": {"replicas": 0}}, "replicas"),
        ({"gateway": {"replicas": 2}}, "needs gateway.persistence.accessMode ReadWriteMany"),
        ({"gateway": {"replicas": 2, "persistence": {"enabled": False}}}, "needs gateway.persistence"),
        ({"monitoring": {"enabled": True}}, "monitoring needs gateway.http.enabled"),
        ({"agents": {"volumeMounts": [{"name": "models"}]}}, "volumeMounts"),
        ({"image": {"registry": "registry.test/"}}, "registry"),
    ],
)
def test_what_is_wrong_in_values_is_named(helm: Path, values: dict[str, Any], at_fault: str) -> None:
    done = template(helm, values)
    assert done.returncode != 0
    assert at_fault in done.stderr


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_a_real_api_server_takes_all_of_it_under_the_strictest_pod_security(
    control_plane: ControlPlane, helm: Path, values: dict[str, Any]
) -> None:
    control_plane.kubectl("apply", "-f", str(ROOT / "manifests" / "crds"))
    control_plane.kubectl("wait", "--for=condition=Established", "crd/kvstores.spillway.dev", "--timeout=60s")
    label = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "chart", "labels": label}}
    control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    done = template(helm, values)
    assert done.returncode == 0, done.stderr
    said = control_plane.kubectl(
        "apply",
        "--dry-run=server",
        "--namespace=chart",
        "--validate=strict",
        "--warnings-as-errors",
        "-f",
        "-",
        stdin=done.stdout,
    )
    wanted = sum(1 for each in yaml.safe_load_all(done.stdout) if each)
    assert said.count("(server dry run)") == wanted


def test_each_token_is_known_to_the_gateway_by_its_hash(render: Render, tmp_path: Path) -> None:
    objects = render(EVERYTHING)
    (tmp_path / "tokens").write_text(one(objects, "Secret", "spillway-gateway")["stringData"]["tokens"])
    access = Access.load(tmp_path / "tokens")
    for kind in Kind:
        token = one(objects, "Secret", f"spillway-{kind}")["stringData"]["token"]
        assert len(token) >= 40
        assert access.caller(f"Bearer {token}").kind == kind
    assert access.tokens is not None
    assert "0" * 64 in access.tokens
    assert render(EVERYTHING) != objects, "other tokens for another install"


def names_in(secret: dict[str, Any]) -> set[str]:
    """Host names that the certificate of a TLS Secret is for."""
    certificate = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names.get_values_for_type(x509.DNSName))


def test_the_certificate_of_its_own_has_every_name_that_callers_use(render: Render) -> None:
    data = one(render(EVERYTHING), "Secret", "spillway-gateway-tls")["data"]
    certificate, authority = (
        x509.load_pem_x509_certificate(base64.b64decode(data[name])) for name in ("tls.crt", "ca.crt")
    )
    called = names_in({"data": data})
    assert {
        "spillway-gateway.chart.svc",
        "spillway-gateway.chart.svc.cluster.local",
        "localhost",
        "batch.test",
    } <= called
    certificate.verify_directly_issued_by(authority)
    key = base64.b64decode(data["tls.key"])
    assert b"PRIVATE KEY" in key


def test_a_secret_of_ones_own_replaces_the_certificate(render: Render) -> None:
    objects = render({"gateway": {"tls": {"secret": "mine"}}})
    assert not [each for each in objects if each["metadata"]["name"] == "spillway-gateway-tls"]
    volumes = one(objects, "StatefulSet", "spillway-gateway")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "tls", "secret": {"secretName": "mine"}} in volumes


@pytest.mark.parametrize(
    ("persistence", "volume", "claims"),
    [
        ({"enabled": False}, {"name": "jobs", "emptyDir": {}}, 0),
        ({"existingClaim": "mine"}, {"name": "jobs", "persistentVolumeClaim": {"claimName": "mine"}}, 0),
        ({}, {"name": "jobs", "persistentVolumeClaim": {"claimName": "spillway-gateway"}}, 1),
    ],
)
def test_jobs_are_kept_where_it_is_asked_for(
    render: Render, persistence: dict[str, Any], volume: dict[str, Any], claims: int
) -> None:
    objects = render({"gateway": {"persistence": persistence}})
    spec = one(objects, "StatefulSet", "spillway-gateway")["spec"]["template"]["spec"]
    assert [each for each in spec["volumes"] if each["name"] == "jobs"] == [volume]
    made = [each["metadata"]["annotations"] for each in objects if each["kind"] == "PersistentVolumeClaim"]
    assert made == [{"helm.sh/resource-policy": "keep"}] * claims


def test_several_gateways_share_one_volume_and_know_each_other_by_the_name_in_their_certificate(render: Render) -> None:
    shared = {"replicas": 2, "persistence": {"accessMode": "ReadWriteMany"}}
    objects = render({"gateway": shared})
    (claim,) = [each["spec"] for each in objects if each["kind"] == "PersistentVolumeClaim"]
    assert claim["accessModes"] == ["ReadWriteMany"]
    told = serve_options(gateway_arguments(objects))
    assert (told["advertise"], str(told["gateway_ca"])) == ("$(POD_IP)", str(told["tls_cert"].with_name("ca.crt")))
    assert told["gateway_name"] in names_in(one(objects, "Secret", "spillway-gateway-tls"))
    gateways = one(objects, "StatefulSet", "spillway-gateway")["spec"]
    assert gateways["replicas"] == 2
    assert one(objects, "PodDisruptionBudget", "spillway-gateway")["spec"]["selector"] == gateways["selector"]
    assert serve_options(gateway_arguments(render()))["advertise"] is None


def gateway_arguments(objects: list[dict[str, Any]]) -> list[str]:
    (container,) = one(objects, "StatefulSet", "spillway-gateway")["spec"]["template"]["spec"]["containers"]
    arguments: list[str] = container["args"]
    return arguments


def serve_options(arguments: list[str]) -> dict[str, Any]:
    """As `spillway serve` understands them."""
    assert arguments[0] == "serve"
    command = typer.main.get_command(app).commands["serve"]
    options: dict[str, Any] = command.make_context("serve", arguments[1:]).params
    return options


def test_the_gateway_is_told_all_of_it_in_its_own_words(render: Render, tmp_path: Path) -> None:
    objects = render(EVERYTHING)
    told = serve_options(gateway_arguments(objects))
    assert told["http"] == "0.0.0.0:7401"
    assert told["input_source"] == EVERYTHING["gateway"]["inputSources"]
    assert told["retention"] == "30d"
    assert str(told["tls_client_ca"]) == "/etc/spillway/tls/ca.crt"
    (tmp_path / "limits.toml").write_text(one(objects, "ConfigMap", "spillway-gateway")["data"]["limits.toml"])
    limits = Limits.load(tmp_path / "limits.toml")
    assert limits.of("anybody") == TenantLimits(100, 10_000_000, 1_000_000_000_000, 50.0)
    assert limits.of("team.a").weight == 2.5
    assert limits.of("team.a").jobs == 100
    ports = {each["name"]: each["port"] for each in one(objects, "Service", "spillway-gateway")["spec"]["ports"]}
    assert ports == {"grpc": 443, "http": 8443}
    assert not any(word.startswith(("--http", "--limits", "--retention")) for word in gateway_arguments(render()))


def test_a_changed_limit_restarts_the_gateway_and_a_new_token_does_not(render: Render) -> None:
    def template_of(values: dict[str, Any]) -> Any:
        return one(render({"gateway": values}), "StatefulSet", "spillway-gateway")["spec"]["template"]

    limited = template_of({"limits": {"default": {"jobs": 3}}})
    assert limited != template_of({"limits": {"default": {"jobs": 4}}})
    assert template_of({}) == template_of({"tokens": ["0" * 64 + " team client"]})


def test_figures_are_scraped_with_the_monitor_s_token(render: Render) -> None:
    http, monitoring = {"http": {"enabled": True}}, {"enabled": True, "labels": {"release": "prometheus"}}
    objects = render({"gateway": http, "monitoring": monitoring})
    gateway = one(objects, "ServiceMonitor", "spillway-gateway")
    service = one(objects, "Service", "spillway-gateway")["metadata"]["labels"]
    assert gateway["spec"]["selector"]["matchLabels"].items() <= service.items()
    (endpoint,) = gateway["spec"]["endpoints"]
    reference = endpoint["authorization"]["credentials"]
    assert one(objects, "Secret", reference["name"])["stringData"][reference["key"]]
    assert endpoint["port"] in {each["name"] for each in one(objects, "Service", "spillway-gateway")["spec"]["ports"]}
    agents = one(objects, "PodMonitor", "spillway-agents")
    pod = agent_pod(ModelDeployment.read(DEPLOYMENT), PodName(0, 1), OperatorConfig.model_validate(SETTINGS))
    assert agents["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    scraped = {each["port"] for each in agents["spec"]["podMetricsEndpoints"]}
    assert scraped <= {each["name"] for each in pod["spec"]["containers"][0]["ports"]}
    assert set(agents["spec"]["podTargetLabels"]) <= set(pod["metadata"]["labels"])
    assert agents["metadata"]["labels"]["release"] == "prometheus"


def test_several_operators_are_not_drained_at_once(render: Render) -> None:
    budget = one(render({"operator": {"replicas": 2}}), "PodDisruptionBudget", "spillway-operator")["spec"]
    deployment = one(render(), "Deployment", "spillway-operator")["spec"]
    assert budget["selector"] == deployment["selector"]
    assert not [each for each in render() if each["kind"] == "PodDisruptionBudget"], "one alone could never be drained"


def test_a_changed_setting_of_the_operator_restarts_it_and_nothing_else_does(render: Render) -> None:
    def stamp(values: dict[str, Any]) -> str:
        deployment = one(render(values), "Deployment", "spillway-operator")
        return str(deployment["spec"]["template"]["metadata"]["annotations"]["checksum/settings"])

    assert stamp({}) == stamp({"test": {"model": "smollm2"}})
    assert stamp({}) != stamp({"agents": {"device": "cpu"}})


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_the_operator_takes_its_settings(render: Render, tmp_path: Path, values: dict[str, Any]) -> None:
    objects = render(values)
    file = tmp_path / "operator.json"
    file.write_text(one(objects, "ConfigMap", "spillway-operator")["data"]["operator.json"])
    config = OperatorConfig.load(file)
    (container,) = one(objects, "Deployment", "spillway-operator")["spec"]["template"]["spec"]["containers"]
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    gateway = config.gateway
    assert {
        str(path.parent) for path in (gateway.ca_file, gateway.token_file, gateway.agent_token_file) if path
    } <= mounted
    assert config.agents.device == values.get("agents", {}).get("device")
    assert list(config.agents.args) == values.get("agents", {}).get("extraArgs", [])
    service = one(objects, "Service", "spillway-gateway")
    assert gateway.address == f"spillway-gateway.chart.svc:{service['spec']['ports'][0]['port']}"


def test_examples_on_the_page_are_values(helm: Path) -> None:
    blocks = PAGE.read_text().split("```yaml\n")[1:]
    assert blocks
    for block in blocks:
        done = template(helm, yaml.safe_load(block.partition("```")[0]))
        assert done.returncode == 0, done.stderr


def test_its_check_digests_answers_and_nothing_else() -> None:
    row = {
        "custom_id": "a",
        "response": {"body": {"id": "x", "choices": [{"index": 0, "text": "t", "finish_reason": "stop"}]}},
    }
    other = json.loads(json.dumps(row))
    other["response"]["body"]["id"] = "y"
    changed = json.loads(json.dumps(row))
    changed["response"]["body"]["choices"][0]["text"] = "u"

    def digest(*rows: dict[str, Any]) -> str:
        done = subprocess.run(
            ["python3", str(CHART / "files" / "check.py"), "/dev/stdin"],
            input="".join(json.dumps(each) + "\n" for each in rows),
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert digest(row) == digest(other)
    assert digest(row) != digest(changed)
    assert len(digest(row).strip()) == hashlib.sha256().digest_size * 2
