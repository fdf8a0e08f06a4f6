"""Results as JSON files under `benchmarks/results/`, and the tables that the docs quote, printed from them."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.peers import NAMES, PEERS, Outcome, Setting


@dataclass(frozen=True)
class Rate:
    """What packed matmuls of the model's shapes reach, and in which dtype."""

    gflop_s: float
    dtype: str


RESULTS = Path(__file__).resolve().parent.parent / "results"


def machine() -> dict[str, Any]:
    """What this is measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    flags = fields.get("flags", "").split()
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {
        "processor": fields.get("model name", "unknown"),
        "family": f"{fields.get('cpu family')}/{fields.get('model')}",
        "cpus": os.cpu_count(),
        "vector": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "memory_bytes": memory,
        "system": platform.platform(),
    }


def gpu_name() -> str:
    """The first GPU, as its driver calls it."""
    import torch

    return torch.cuda.get_device_name(0)


def shared_tokens(output: list[int], reference: list[int]) -> int:
    """How many tokens from the start agree."""
    length = min(len(output), len(reference))
    return next((at for at in range(length) if output[at] != reference[at]), length)


def match_share(outputs: list[list[int]], reference: list[list[int]]) -> float:
    """Mean share of each line's tokens, from its start, that equal the reference's."""
    shares = [shared_tokens(output, wanted) / len(wanted) for output, wanted in zip(outputs, reference, strict=True)]
    return sum(shares) / len(shares)


def match_share_of_texts(texts: list[str], reference: list[list[int]], checkpoint: Path) -> float:
    """The same for a peer that gives text: the longest start of the reference's tokens that the text begins with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    shares = []
    for text, wanted in zip(texts, reference, strict=True):
        if text == tokenizer.decode(wanted):
            shares.append(1.0)
            continue
        low, high = 0, len(wanted)
        while low < high:  # what a start of the tokens decodes to only ever grows, half characters at its end apart
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _begins(text, tokenizer.decode(wanted[:middle])) else (low, middle - 1)
        shares.append(low / len(wanted))
    return sum(shares) / len(shares)


def _begins(text: str, start: str) -> bool:
    return text.startswith(start.rstrip("\ufffd"))


def record(setting: Setting, outcome: Outcome, match: float | None, rate: Rate) -> dict[str, Any]:
    """One peer's figures on one setting. Tokens are generated ones; seconds are those of the batch."""
    work, process = setting.workload, outcome.process
    gflop = work.flops(setting.shape) / 1e9
    return {
        "generated_tokens_per_s": work.output_tokens / outcome.batch_s,
        "batch_s": outcome.batch_s,
        "load_s": outcome.load_s,
        "process_s": process.wall_s,
        "process_cpu_s": process.cpu_s,
        "peak_rss_bytes": process.peak_rss_bytes,
        "match_share": match,
        "packed_gflop_s": rate.gflop_s,
        "packed_dtype": rate.dtype,
        "packed_share": gflop / outcome.batch_s / rate.gflop_s,
        "command": outcome.command,
        "versions": outcome.versions,
        "details": outcome.details,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def file_of(setting: Setting) -> Path:
    """Where one comparison is kept."""
    device = "" if setting.device == "cpu" else f"-{setting.device}"
    return RESULTS / f"offline-{setting.model}-{setting.workload.name}-{setting.dtype}{device}.json"


def save(setting: Setting, peers: dict[str, dict[str, Any]], seed: int, command: list[str]) -> Path:
    """Write one comparison; peers that were not run this time keep the figures they had."""
    work = setting.workload
    path = file_of(setting)
    before = json.loads(path.read_text())["peers"] if path.exists() else {}
    comparison = {
        "model": setting.model,
        "workload": work.name,
        "lines": len(work.lines),
        "prompt_tokens": work.prompt_tokens,
        "output_tokens": work.output_tokens,
        "tflop": work.flops(setting.shape) / 1e12,
        "dtype": setting.dtype,
        "threads": setting.threads,
        "device": setting.device,
        "gpu": gpu_name() if setting.device == "cuda" else None,
        "seed": seed,
        "command": command,
        "machine": machine(),
        "peers": before | peers,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(comparison, indent=1) + "\n")
    return path


def table(comparison: dict[str, Any]) -> str:
    """A comparison as a markdown table, fastest first; failures last, with their reason."""
    head = (
        f"**{comparison['model']}, {comparison['workload']}, {comparison['dtype']}**: {comparison['lines']} lines, "
        f"{comparison['prompt_tokens']:,} prompt and {comparison['output_tokens']:,} generated tokens, "
        f"{comparison['threads']} threads, {comparison.get('gpu') or comparison['machine']['processor']}\n"
    )
    rows = [
        "| | tokens/s | batch s | whole process s | CPU s | peak RSS MiB | match | of packed rate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    peers = comparison["peers"]
    done = sorted((n for n in peers if "error" not in peers[n]), key=lambda n: peers[n]["batch_s"])
    for name in done:
        each = peers[name]
        title = PEERS[name].title if name in PEERS else f"**{name}**"
        match = "-" if each["match_share"] is None else f"{each['match_share']:.3f}"
        rows.append(
            f"| {title} | {each['generated_tokens_per_s']:.0f} | {each['batch_s']:.1f} | {each['process_s']:.1f} "
            f"| {each['process_cpu_s']:.1f} | {each['peak_rss_bytes'] / 2**20:.0f} | {match} "
            f"| {each['packed_share']:.0%} |"
        )
    for name in (n for n in NAMES if n in peers and "error" in peers[n]):
        title = PEERS[name].title if name in PEERS else f"**{name}**"
        rows.append(f"| {title} | failed: {peers[name]['error'].splitlines()[-1]} |||||||")
    return head + "\n" + "\n".join(rows) + "\n"


def attention_table(kept: dict[str, Any]) -> str:
    """What `benchmarks/kernels/cpu_attention.py` kept, as a markdown table."""
    read, matmul = kept["read_bytes_per_s"], kept["matmul_flop_per_s"]
    rows = [
        f"{kept['machine']['processor']}, {kept['threads']} threads, torch {kept['torch']}; limits of this run: "
        f"{read / 1e9:.0f} GB/s read, {matmul / 1e9:.0f} GFLOP/s float32 matmul\n",
        "| op | dtype | heads | sequences x tokens | Spillway | SDPA | ratio | of limit | errors |",
        "|---|---|---|---|---:|---:|---:|---:|---|",
    ]
    for each in kept["cells"]:
        unit, limit = ("GB/s", read) if each["op"] == "decode" else ("GFLOP/s", matmul)
        tokens = f"{each['shortest']}" + (f" to {each['longest']}" if each["longest"] > each["shortest"] else "")
        rows.append(
            f"| {each['op']} | {each['dtype']} | {each['heads']} | {each['sequences']} x {tokens} "
            f"| {each['spillway'] / 1e9:.1f} {unit} | {each['sdpa'] / 1e9:.1f} "
            f"| {each['spillway'] / each['sdpa']:.2f} | {each['spillway'] / limit:.0%} "
            f"| {each['errors']['spillway']:.0e}, {each['errors']['SDPA']:.0e} |"
        )
    return "\n".join(rows) + "\n"


def store_table(kept: dict[str, Any]) -> str:
    """What one of `benchmarks/kvstore/` kept, as a markdown table."""
    machine, columns = kept["machine"], list(kept["rows"][0])
    settings = ", ".join(f"{key} {value}" for key, value in kept["settings"].items())
    beside = f", {machine['busy_beside']} CPUs busy with something else" if "busy_beside" in machine else ""
    numeric = ["---:" if isinstance(kept["rows"][-1][column], int | float) else "---" for column in columns]
    rows = [
        f"{machine['processor']}, {machine['cpus']} CPUs{beside}; {settings}\n",
        "| " + " | ".join(columns) + " |",
        "|" + "|".join(numeric) + "|",
    ]
    rows += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in kept["rows"]]
    return "\n".join(rows) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return "" if value is None else str(value)
