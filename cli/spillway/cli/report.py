"""What a run did: the summary for people and ``--report`` for machines, from the same numbers."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spillway.cli.sizes import format_size
from spillway.kvstore import StoreStats
from spillway.node_agent.container import usable_cpus
from spillway.node_agent.engine import EngineStats


@dataclass(frozen=True, slots=True)
class LineCounts:
    """Lines of the job: all, those with a result, those with an error, and those that earlier runs had done."""

    total: int
    succeeded: int
    failed: int
    done_before: int


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run of a job. Tokens and seconds are this run's; lines are the job's."""

    model: str
    dtype: str
    device: str
    lines: LineCounts
    load_s: float
    run_s: float
    prompt_tokens: int
    completion_tokens: int
    engine: EngineStats
    block_bytes: int
    command: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        """Prompt and generated tokens answered in a second, load time left out."""
        return (self.prompt_tokens + self.completion_tokens) / self.run_s if self.run_s else 0.0

    @property
    def prefix_hit_share(self) -> float:
        """Share of admitted prompt tokens whose KV was found instead of computed."""
        scheduler = self.engine.scheduler
        return scheduler.reused_tokens / scheduler.prompt_tokens if scheduler.prompt_tokens else 0.0

    def as_json(self) -> dict[str, Any]:
        """Everything, with the machine and the versions it ran on."""
        return {
            "command": list(self.command),
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "lines": asdict(self.lines),
            "load_s": self.load_s,
            "run_s": self.run_s,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "tokens_per_s": self.tokens_per_s,
            "generated_tokens_per_s": self.completion_tokens / self.run_s if self.run_s else 0.0,
            "prefix_hit_share": self.prefix_hit_share,
            "scheduler": asdict(self.engine.scheduler) | {"waste_share": self.engine.scheduler.waste_share},
            "pool": {
                "blocks": self.engine.pool_blocks,
                "bytes": self.engine.pool_blocks * self.block_bytes,
                "block_bytes": self.block_bytes,
                "peak_blocks": self.engine.scheduler.peak_blocks,
            },
            "store": asdict(self.engine.store) if self.engine.store else None,
            "cuda_graphs": asdict(self.engine.graphs) if self.engine.graphs else None,
            "peak_rss_bytes": peak_rss_bytes(),
            "machine": machine(),
        }

    def write(self, path: Path) -> None:
        """Write the JSON, complete or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    def print_summary(self) -> None:
        """The table at the end of a run, on stderr."""
        console = Console(stderr=True)
        scheduler, lines = self.engine.scheduler, self.lines
        console.print(
            f"\n[bold]{lines.succeeded + lines.failed}[/] of {lines.total} lines done "
            f"({lines.succeeded} answered, {lines.failed} refused with a code, {lines.done_before} by earlier runs)\n"
            f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} generated tokens in {self.run_s:.1f} s: "
            f"[bold]{self.tokens_per_s:,.0f} tokens/s[/] "
            f"({self.completion_tokens / max(self.run_s, 1e-9):,.0f} generated/s); "
            f"model loaded in {self.load_s:.1f} s\n"
            f"prefix hits: [bold]{self.prefix_hit_share:.1%}[/] of prompt tokens; {scheduler.preemptions} preemptions; "
            f"pool waste {scheduler.waste_share:.1%}; peak memory {format_size(peak_rss_bytes())}"
        )
        if self.engine.store is not None and (foreseen := _foreseen(self.engine.store)):
            console.print(foreseen)
        console.print(self._tier_table())

    def _tier_table(self) -> Table:
        table = Table("tier", "blocks", "used", "budget", "hits", "misses", "evicted", "verify failures")
        table.add_row(
            "device",
            f"{self.engine.scheduler.peak_blocks} (peak)",
            format_size(self.engine.scheduler.peak_blocks * self.block_bytes),
            format_size(self.engine.pool_blocks * self.block_bytes),
            *["-"] * 4,
        )
        for name, tier in self.engine.store.tiers.items() if self.engine.store else ():
            table.add_row(
                name,
                str(tier.blocks),
                format_size(tier.bytes),
                format_size(tier.budget_bytes),
                str(tier.hits),
                str(sum(tier.misses.values())),
                str(tier.evictions),
                str(tier.verify_failures),
            )
        return table


def _foreseen(store: StoreStats) -> str:
    """What the plan was good for; empty if there was none, or nothing to do."""
    parts = [
        f"{count:,} blocks {text}"
        for count, text in (
            (store.spared, "not written, since no line reads them again"),
            (store.prefetch_hits, "in host memory ahead of need"),
            (store.late_loads, "late"),
        )
        if count
    ]
    return f"foreseen: {', '.join(parts)}" if parts else ""


def peak_rss_bytes() -> int:
    """The most memory that this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "processor": _processor(),
        "cpus": usable_cpus(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("spillway", "torch", "llvmlite", "numpy", "transformers")},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor()
    return platform.processor()
