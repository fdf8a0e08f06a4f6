"""Who is measured, and how each is started. Every one runs as a process of its own in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.environments import PEERS as SCRIPTS
from harness.environments import Environments
from harness.measure import Measured, measured
from harness.models import Shape
from harness.workloads import Workload

KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
"""glibc never gives memory back: most of what transformers loses on a CPU is page faults on fresh memory."""
SEQUENCES = 64


class PeerError(RuntimeError):
    """A peer could not be set up or did not finish; the message says what it wrote last."""


@dataclass(frozen=True)
class Peer:
    """A row of the table. `export` names the format that its model must be turned into first."""

    title: str
    environment: str
    script: str
    options: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    export: str | None = None
    kv_from_workload: bool = False
    device: str = "cpu"


PEERS = {
    "openvino": Peer(
        "OpenVINO GenAI continuous batching", "openvino", "openvino_paged.py", export="openvino", kv_from_workload=True
    ),
    "vllm": Peer("vLLM, CPU build", "vllm", "vllm_paged.py", kv_from_workload=True),
    "transformers": Peer(
        "transformers generate, sorted, static cache, packed linears",
        "transformers",
        "hf_static.py",
        {"linears": "packed"},
        KEEP_PAGES,
    ),
    "llama.cpp": Peer("llama.cpp, batched by sequence", "llamacpp", "llamacpp_batch.py", export="gguf"),
    "transformers-cb": Peer(
        "transformers continuous batching, packed linears",
        "transformers",
        "hf_paged.py",
        {"linears": "packed"},
        KEEP_PAGES,
    ),
    "vllm-cuda": Peer("vLLM", "vllm-cuda", "vllm_paged.py", device="cuda"),
    "transformers-cuda": Peer(
        "transformers generate, sorted, static cache", "transformers", "hf_static.py", device="cuda"
    ),
    "transformers-cb-cuda": Peer("transformers continuous batching", "transformers", "hf_paged.py", device="cuda"),
    "accelerate-cpu": Peer("accelerate cpu_offload", "transformers", "hf_offload.py", {"tier": "cpu"}),
    "accelerate-disk": Peer("accelerate disk_offload", "transformers", "hf_offload.py", {"tier": "disk"}),
}
SPILLWAY = "spillway"
NAMES = (SPILLWAY, *PEERS)
DEVICES = ("cpu", "cuda")


def names_on(device: str) -> tuple[str, ...]:
    """Who can be measured on a device."""
    return (SPILLWAY, *(name for name, peer in PEERS.items() if peer.device == device))


@dataclass(frozen=True)
class Setting:
    """One comparison: a model, a workload, a dtype, on this machine's CPU or its first GPU."""

    model: str
    checkpoint: Path
    shape: Shape
    workload: Workload
    dtype: str
    threads: int
    device: str = "cpu"

    @property
    def own_budget(self) -> SpillwayBudget:
        """KV memory of our own: what everybody gets on a CPU, most of a GPU as everybody takes there."""
        on_cpu = self.device == "cpu"
        return SpillwayBudget(device_kv=f"{self.workload.kv_gib}GiB" if on_cpu else None)


@dataclass(frozen=True)
class Place:
    """Where things are kept, and how long one peer may take."""

    folder: Path
    environments: Environments
    limit_s: float

    def path(self, *parts: str) -> Path:
        """A path below the folder; its parent exists."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True)
class Outcome:
    """What one peer did: its process measured from outside, its batch from inside."""

    process: Measured
    batch_s: float
    load_s: float
    outputs: list[list[int]] | list[str]
    command: list[str]
    versions: list[str]
    details: dict[str, Any] = field(default_factory=dict)


def export(kind: str, setting: Setting, place: Place) -> Path:
    """The model in a peer's own format, converted once.

    Raises:
        PeerError: the converter failed.
    """
    if kind == "gguf":
        target = place.path("exports", f"{setting.model}-{setting.dtype}.gguf")
        python = place.environments.python("llamacpp")
        command = [python, SCRIPTS / "to_gguf.py", setting.checkpoint, target, setting.dtype]
    else:
        target = place.path("exports", f"{setting.model}-openvino")
        python = place.environments.python("openvino-export")
        command = [python.parent / "optimum-cli", "export", "openvino", "--model", setting.checkpoint]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp32", target.with_suffix(".partial")]
    if not target.exists():
        print(f"converting {setting.model} to {target.name} …", file=sys.stderr, flush=True)
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerError("conversion failed: " + _last_line(done.stderr))
        if kind != "gguf":
            target.with_suffix(".partial").rename(target)
    return target


def run_peer(name: str, setting: Setting, place: Place) -> Outcome:
    """Run one peer on one setting.

    Raises:
        InstallError: its environment could not be installed.
        PeerError: it failed or took too long.
    """
    if name == SPILLWAY:
        return run_spillway(setting, place, setting.own_budget)
    peer = PEERS[name]
    python = place.environments.python(peer.environment)
    options = dict(peer.options)
    if peer.export:
        options["export"] = str(export(peer.export, setting, place))
    if peer.kv_from_workload:
        options["kv_gib"] = str(setting.workload.kv_gib)
    task = write_task(setting, place, name, options)
    result = place.path("results", f"{name}.json")
    result.unlink(missing_ok=True)
    command = [str(python), str(SCRIPTS / peer.script), str(task), str(result)]
    log = place.path("logs", f"{name}.txt")
    process = measured(command, environment(setting.threads) | peer.env, log, place.limit_s)
    if process.return_code != 0 or not result.exists():
        raise PeerError(_why(process, log, place.limit_s))
    figures = json.loads(result.read_text())
    return Outcome(
        process=process,
        batch_s=figures["batch_s"],
        load_s=figures["load_s"],
        outputs=figures["outputs"],
        command=[Path(part).name for part in command],
        versions=place.environments.packages(peer.environment),
        details={"batch_cpu_s": figures["batch_cpu_s"], "warm_up_s": figures["warm_up_s"], "options": peer.options},
    )


@dataclass(frozen=True)
class SpillwayBudget:
    """Flags of `spillway run` that hold its KV budgets; those left out keep the command's defaults.

    ``kept``: KV on disk lies in a directory that the user named, for later runs.
    """

    device_kv: str | None
    host_kv: str | None = None
    disk_kv: str | None = None
    kept: bool = True
    extra: tuple[str, ...] = ()

    def flags(self, disk_dir: Path) -> list[str]:
        """As arguments."""
        flags = ["--device-kv", self.device_kv, *self.extra] if self.device_kv is not None else [*self.extra]
        if self.host_kv is not None:
            flags += ["--host-kv", self.host_kv]
        if self.disk_kv is not None:
            flags += ["--disk-kv", self.disk_kv]
        if self.disk_kv is not None and self.kept:
            flags += ["--disk-dir", str(disk_dir)]
        return flags


def run_spillway(setting: Setting, place: Place, budget: SpillwayBudget) -> Outcome:
    """`spillway run` on the same lines, as anybody would start it; its batch time is from its own report.

    Raises:
        PeerError: it failed or took too long, or a line has no result.
    """
    source, target = place.path("spillway", "in.jsonl"), place.path("spillway", "out.jsonl")
    report, log = place.path("spillway", "report.json"), place.path("logs", "spillway.txt")
    disk = place.path("spillway", "disk")
    setting.workload.write_jsonl(source, setting.model)
    clean(target.parent, keep=source)
    command = [str(Path(sys.executable).parent / "spillway"), "run", "--model", str(setting.checkpoint)]
    command += ["--input", str(source), "--output", str(target), "--report", str(report), "--dtype", setting.dtype]
    command += ["--device", setting.device]
    command += budget.flags(disk)
    process = measured(command, environment(setting.threads), log, place.limit_s)
    if process.return_code != 0 or not report.exists():
        raise PeerError(_why(process, log, place.limit_s))
    figures = json.loads(report.read_text())
    flags = ["--dtype", setting.dtype, "--device", setting.device, *budget.flags(Path("DISK"))]
    return Outcome(
        process=process,
        batch_s=figures["run_s"],
        load_s=figures["load_s"],
        outputs=read_texts(target, setting.workload.batch_lines),
        command=["spillway", "run", *flags],
        versions=[
            f"{name}=={number}" for name, number in figures["machine"].items() if name not in ("processor", "cpus")
        ],
        details={"report": brief(figures)},
    )


def brief(report: dict[str, Any]) -> dict[str, Any]:
    """A run's report without what the result says anyhow, and without the latency histograms of its tiers."""
    kept = {key: report[key] for key in report if key not in ("command", "machine", "model")}
    if report["store"]:
        tiers = report["store"]["tiers"].items()
        short = {name: {key: tier[key] for key in tier if not key.endswith("latency")} for name, tier in tiers}
        kept["store"] = {**report["store"], "tiers": short}
    return kept


def read_texts(output: Path, lines: int) -> list[str]:
    """The texts of the lines of a batch output file, in input order, each line's in order of its prompts.

    Raises:
        PeerError: a line has no result.
    """
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    texts = {row["custom_id"]: [each["text"] for each in row["response"]["body"]["choices"]] for row in rows}
    if len(texts) != lines:
        raise PeerError(f"{len(texts)} results for {lines} lines")
    return [text for number in range(lines) for text in texts[f"line-{number}"]]


def write_task(setting: Setting, place: Place, name: str, options: dict[str, str]) -> Path:
    """The task file that a peer's script reads."""
    scratch = place.path("scratch", name, setting.model)
    scratch.mkdir(exist_ok=True)
    fields = {
        "model": str(setting.checkpoint),
        "dtype": setting.dtype,
        "device": setting.device,
        "threads": setting.threads,
        "share_prefixes": setting.workload.shares_prefixes,
        "scratch": str(scratch),
        "options": options,
        "lines": setting.workload.lines,
    }
    task = place.path("tasks", f"{name}.json")
    task.write_text(json.dumps(fields))
    return task


def environment(threads: int) -> dict[str, str]:
    """Environment variables of a measured process."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }


def clean(folder: Path, keep: Path) -> None:
    """Remove what an earlier run left, so that nothing is resumed or warm."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path != keep:
            path.unlink()


def _why(process: Measured, log: Path, limit_s: float) -> str:
    if process.return_code is None:
        return f"not done after {limit_s:.0f} s"
    return f"exit code {process.return_code}: {_last_line(log.read_text(errors='replace'))}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "no output"
