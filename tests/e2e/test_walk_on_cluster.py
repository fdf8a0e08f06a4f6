"""docs/kubernetes.md on a real cluster, section by section, with an agent killed and a node cut off on the way.

The tests are one story, in the order of this file: each stands on the one before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from on_cluster import CHECKOUT, HOME_NODE, Outside, Reference, answers, kill_pod, provide, until, values
from testcluster import builds
from testcluster.cluster import Cluster
from walk import Walk, sections

sys.path[:0] = [str(CHECKOUT / "examples"), str(CHECKOUT / "examples" / "documents")]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

PAGE = CHECKOUT / "docs" / "kubernetes.md"
CHART = CHECKOUT / "helm" / "spillway"


def fault_lines() -> list[dict[str, Any]]:
    """Long and short answers over the documents, so that they end one after the other."""
    from make_batch import questions

    lines = []
    for place, question in enumerate(questions("second")):
        line = question.line()
        body: Any = line["body"]
        body |= {"max_tokens": 32 + 8 * place, "ignore_eos": True}
        lines.append(line | {"custom_id": f"fault-{place}"})
    return lines


def documents() -> list[dict[str, Any]]:
    from make_batch import questions

    return [question.line() for question in questions("first") + questions("second")]


@dataclass(frozen=True)
class Stage:
    cluster: Cluster
    walk: Walk
    reference: Reference
    blocks: dict[int, list[str]]
    """Of the page, those that were not run yet."""

    def section(self, number: int) -> list[str]:
        """Runs its blocks, once; what each prints."""
        return [self.walk.run(block) for block in self.blocks.pop(number)]

    def get(self, *what: str) -> Any:
        return json.loads(self.cluster.control_plane.kubectl("get", *what, "-o", "json"))

    def agents(self) -> dict[str, str]:
        """Agents that are ready: name of the pod → its node."""
        found = self.get("pods", "-l", "app.kubernetes.io/name=spillway-agent")["items"]
        ready = [
            pod
            for pod in found
            if "deletionTimestamp" not in pod["metadata"]
            and any(
                each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ())
            )
        ]
        return {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in ready}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("agents in pods take this machine's torch: it must be one for Python 3.11, as in the images")
    if reason := builds.why_not_here():
        pytest.skip(reason)
    from fetch_smollm2 import default_cache, fetch

    found = fetch(default_cache())
    for file in found.iterdir():
        file.chmod(0o644)  # agents are another user
    return found


@pytest.fixture(scope="module")
def stage(checkpoint: Path, cluster: Cluster, helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("walk")
    for name in ("helm", "manifests", "examples"):
        (folder / name).symlink_to(CHECKOUT / name)
    (folder / "compiled").mkdir(mode=0o700)
    (folder / "values.yaml").write_text(json.dumps(values(checkpoint, folder / "compiled")))
    environment = cluster.mark | {
        "KUBECONFIG": str(cluster.control_plane.kubeconfig),
        "PATH": os.pathsep.join(
            [str(cluster.programs), str(helm.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder / ".config"),
    }
    small = [json.loads(row) for row in (CHART / "files" / "lines.jsonl").read_text().splitlines()]
    reference = Reference(checkpoint, documents() + fault_lines() + small, folder, cluster.mark)
    walk = Walk(folder, environment)
    try:
        provide(cluster, folder)
        yield Stage(cluster, walk, reference, sections(PAGE.read_text()))
    finally:
        reference.end()
        walk.end()


@pytest.fixture(autouse=True)
def unbroken(request: pytest.FixtureRequest) -> Iterator[None]:
    """One step of the story that failed ends it."""
    failed = request.session.testsfailed
    if getattr(request.module, "_failed", False):
        pytest.skip("an earlier step failed")
    yield
    if request.session.testsfailed > failed:
        request.module._failed = True


def test_the_chart_installs_under_the_strictest_pod_security(stage: Stage) -> None:
    stage.section(2)
    pods = stage.get("pods", "-n", "spillway")["items"]
    assert {pod["spec"]["nodeName"] for pod in pods} == {HOME_NODE}
    assert len(pods) == 2


def test_a_model_runs_on_two_replicas_and_columns_tell(stage: Stage) -> None:
    printed = stage.section(3)[0]
    assert len(set(stage.agents().values())) == 2, "each replica on a node of its own"
    table = [line.split() for line in printed.splitlines() if "smollm2" in line and "/models/" in line]
    assert table[0][1:4] == ["/models/SmolLM2-135M-Instruct", "2", "2"]


def test_a_batch_job_is_run(stage: Stage) -> None:
    printed = stage.section(4)[0]
    row = next(line.split() for line in printed.splitlines() if line.startswith("documents "))
    assert row[1:5] == ["smollm2", "Completed", "32/32", "0"]


def test_results_reach_the_outside_and_equal_those_of_run(stage: Stage) -> None:
    stage.section(5)
    expected = stage.reference.answers()
    folder = stage.walk.folder
    first = answers((folder / "documents-out.jsonl").read_bytes())
    assert first == {key: expected[key] for key in first}
    assert len(first) == 32
    streamed = answers((folder / "streamed.jsonl").read_bytes())
    assert len(streamed) == 40
    assert streamed == {key: expected[key.removeprefix("again-")] for key in streamed}


def test_blocks_were_spilled_and_fetched_from_the_other_node(stage: Stage) -> None:
    counts: Counter[str] = Counter()
    for row in (stage.walk.folder / "blocks").read_text().splitlines():
        if row.startswith("spillway_"):
            name, _, value = row.rpartition(" ")
            counts[name] += int(float(value))
    assert counts['spillway_kv_tier_stores_total{tier="host"}'] > 0
    assert counts['spillway_kv_tier_hits_total{tier="peer"}'] > 0


def test_helm_test_gets_the_digest_of_run(stage: Stage) -> None:
    printed = stage.section(6)[0]
    check = [sys.executable, str(CHART / "files" / "check.py"), str(_small_output(stage))]
    expected = subprocess.run(check, capture_output=True, text=True, check=True).stdout.strip()
    assert printed.count(f"3 lines answered, digest {expected}") == 2


def _small_output(stage: Stage) -> Path:
    rows = {json.loads(row)["custom_id"]: row for row in stage.reference.output.read_text().splitlines()}
    path = stage.walk.folder / "small-out.jsonl"
    path.write_text("".join(rows[name] + "\n" for name in ("first", "second", "third")))
    return path


def test_a_killed_agent_and_a_cut_off_node_lose_no_line(stage: Stage) -> None:
    folder, outside = stage.walk.folder, Outside(stage.walk.folder)
    (folder / "faults.jsonl").write_text("".join(json.dumps(line) + "\n" for line in fault_lines()))
    agents = stage.agents()
    assert len(agents) == 2
    cut = next(pod for pod, node in agents.items() if node != HOME_NODE)
    killed = next(pod for pod in agents if pod != cut)
    job = stage.walk.run("spillway submit faults.jsonl --model smollm2").strip()
    until(lambda: outside.completed(job) > 0, "some lines are done")
    kill_pod(killed)
    seen = outside.completed(job)
    until(lambda: outside.completed(job) > seen, "the other agent goes on")
    assert outside.job(job).lines.pending > 0, "the job was over before its node could be cut off"
    node = stage.cluster.nodes[agents[cut]]
    node.cut_off()
    try:
        stage.walk.run(f"spillway watch {job}")
    finally:
        node.bring_back()
    stage.walk.run(f"spillway results {job} --output faults-out.jsonl")
    found, expected = answers((folder / "faults-out.jsonl").read_bytes()), stage.reference.answers()
    assert found == {line["custom_id"]: expected[line["custom_id"]] for line in fault_lines()}
    stage.cluster.wait_ready(node.name)
    until(lambda: len(stage.agents()) == 2, "both replicas are back")
    assert not {killed, cut} & stage.agents().keys(), "they are other generations"


def test_the_operator_was_never_refused(stage: Stage) -> None:
    calls = stage.cluster.control_plane.audited("system:serviceaccount:spillway:spillway-operator")
    assert calls
    decided = "authorization.k8s.io/decision"
    assert not [row["requestURI"] for row in calls if row.get("annotations", {}).get(decided) == "forbid"]


def namespaced(stage: Stage) -> list[str]:
    """What there is beside the cluster's own."""
    kinds = "pods,services,statefulsets,deployments,secrets,configmaps,leases,persistentvolumeclaims"
    return [
        f"{each['kind']} {each['metadata']['namespace']}/{each['metadata']['name']}"
        for each in stage.get(kinds, "--all-namespaces")["items"]
        if not each["metadata"]["namespace"].startswith("kube-")
        and each["metadata"]["name"] not in ("kube-root-ca.crt", "kubernetes")
    ]


def test_nothing_is_left_behind(stage: Stage) -> None:
    stage.section(8)
    assert not any(stage.blocks.values()), "commands of the page that nobody has run"
    until(lambda: not namespaced(stage), "pods end, and what belonged to what was deleted goes too")
    cluster_wide = stage.get("clusterroles,clusterrolebindings,crds")["items"]
    assert not [each["metadata"]["name"] for each in cluster_wide if "spillway" in each["metadata"]["name"]]
    for folder in ("jobs", "compiled"):
        shutil.rmtree(stage.walk.folder / folder)
