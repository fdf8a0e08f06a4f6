"""The measurements of Spillway alone: what spilling costs and planning saves, what the pool buys, what lines weigh."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from harness.models import CHECKOUT, Shape, shape_of, tiny_llama
from harness.peers import Outcome, PeerError, Place, Setting, SpillwayBudget, run_spillway
from harness.results import RESULTS, machine
from harness.workloads import Workload

MIB = 1 << 20
POOL_PLOT = CHECKOUT / "docs" / "kv-pool.svg"


def full_kv_bytes(setting: Setting) -> int:
    """KV of all lines at once, at their full length."""
    element = 4 if setting.dtype == "float32" else 2
    tokens = setting.workload.prompt_tokens + setting.workload.output_tokens
    return tokens * setting.shape.kv_token_bytes(element)


def spill(setting: Setting, place: Place) -> None:
    """The same lines with ample device pool, and with a 6th of what they need: host, disk or neither below it.

    A small pool costs something by itself (fewer lines at a time), so both ratios are told: to the ample pool, and to
    the same small pool with nothing below it, where a preempted line is computed again.
    """
    full = full_kv_bytes(setting)
    small, below = f"{full // 6 // MIB}MiB", f"{2 * full // MIB}MiB"
    budgets = {
        "ample pool": SpillwayBudget(f"{2 * full // MIB}MiB", host_kv="0", disk_kv="0"),
        "small pool, recompute": SpillwayBudget(small, host_kv="0", disk_kv="0"),
        "small pool, host": SpillwayBudget(small, host_kv=below, disk_kv="0"),
        "small pool, disk": SpillwayBudget(small, host_kv="0", disk_kv=below),
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, budget, outcome, first in _each(budgets, setting, place):
        rows[name] = {
            "device_kv": budget.device_kv,
            "batch_s": outcome.batch_s,
            "ratio": outcome.batch_s / first.batch_s,
            "peak_rss_bytes": outcome.process.peak_rss_bytes,
            "same_output": outcome.outputs == first.outputs,
            "report": outcome.details["report"],
        }
    _save(f"spill-{setting.model}-{setting.workload.name}-{setting.dtype}", "spill", setting, rows)


def plan(setting: Setting, place: Place) -> None:
    """What keeping KV by the plan is worth against recency, and against computing again: host alone, host and disk.

    The device pool holds a 6th of the different KV of the lines, host memory a 4th, the disk all of it. On disk, KV is
    the job's own and goes with it; `disk kept` is a directory that the user named, so that it is also written for
    later runs.
    """
    element = 4 if setting.dtype == "float32" else 2
    different = setting.workload.different_tokens() * setting.shape.kv_token_bytes(element)
    device, host, disk = (f"{different * part // 12 // 1024}KiB" for part in (2, 3, 24))
    budgets = {
        "ample pool": SpillwayBudget(f"{2 * full_kv_bytes(setting) // MIB}MiB", host_kv="0"),
        "recompute": SpillwayBudget(device, host_kv="0"),
    }
    for policy in ("lru", "plan"):
        extra = ("--kv-policy", policy)
        budgets[f"host, {policy}"] = SpillwayBudget(device, host_kv=host, extra=extra)
        budgets[f"host and disk, {policy}"] = SpillwayBudget(device, host, disk, kept=False, extra=extra)
        budgets[f"disk kept, {policy}"] = SpillwayBudget(device, host, disk, extra=extra)
    rows: dict[str, dict[str, Any]] = {}
    for name, _, outcome, first in _each(budgets, setting, place):
        rows[name] = {
            "batch_s": outcome.batch_s,
            "tokens_per_s": (setting.workload.prompt_tokens + setting.workload.output_tokens) / outcome.batch_s,
            "same_output": outcome.outputs == first.outputs,
            "flags": outcome.command[2:],
            "report": outcome.details["report"],
        }
    _save(f"plan-{setting.model}-{setting.workload.name}-{setting.dtype}", "plan", setting, rows)


def pool(setting: Setting, place: Place) -> None:
    """Tokens a second for device pools from a 64th of the lines' KV to all of it, and the plot for the docs."""
    full = full_kv_bytes(setting)
    rows: dict[str, dict[str, Any]] = {}
    for part in (64, 32, 16, 8, 4, 2, 1):
        size = full // part // MIB * MIB
        budget = SpillwayBudget(f"{size // MIB}MiB", host_kv=f"{2 * full // MIB}MiB", disk_kv="0")
        outcome = _run(f"pool of 1/{part}", setting, place, budget)
        rows[str(size)] = {
            "pool_bytes": size,
            "batch_s": outcome.batch_s,
            "generated_tokens_per_s": setting.workload.output_tokens / outcome.batch_s,
            "peak_rss_bytes": outcome.process.peak_rss_bytes,
            "preemptions": outcome.details["report"]["scheduler"]["preemptions"],
        }
    _save(f"pool-{setting.model}-{setting.workload.name}-{setting.dtype}", "pool", setting, rows)
    plot_pool(list(rows.values()), setting)


def plot_pool(rows: list[dict[str, Any]], setting: Setting) -> None:
    """Draw KV bytes of device pool against tokens/s."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "spillway"  # the same figures give the same file
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot([row["pool_bytes"] / MIB for row in rows], [row["generated_tokens_per_s"] for row in rows], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["pool_bytes"] / MIB for row in rows], [f"{row['pool_bytes'] // MIB:,}" for row in rows])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("device pool, MiB of KV (what does not fit is spilled to host memory)")
    axes.set_ylabel("generated tokens/s")
    full = full_kv_bytes(setting) / MIB
    axes.set_title(
        f"{setting.model}, {setting.workload.name}, {setting.dtype}; all lines' KV: {full:,.0f} MiB", fontsize=10
    )
    axes.grid(visible=True, alpha=0.3)
    POOL_PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(POOL_PLOT, metadata={"Date": None})
    print(f"drawn: {POOL_PLOT.relative_to(CHECKOUT)}", file=sys.stderr)


def memory(setting: Setting, place: Place) -> None:
    """Peak memory of 100 and of 100,000 short lines on a tiny model, where nothing but the lines could add up."""
    folder = tiny_llama(place.path("models", "tiny-llama"))
    rows: dict[str, dict[str, Any]] = {}
    for count in (100, 100_000):
        work = short_lines(count, shape_of(folder))
        tiny = replace(setting, model="tiny-llama", checkpoint=folder, shape=shape_of(folder), workload=work)
        budget = SpillwayBudget("64MiB", host_kv="64MiB", disk_kv="0")
        outcome = _run(f"{count:,} lines", tiny, place, budget)
        rows[str(count)] = {
            "lines": count,
            "peak_rss_bytes": outcome.process.peak_rss_bytes,
            "batch_s": outcome.batch_s,
            "lines_per_s": count / outcome.batch_s,
            "input_bytes": place.path("spillway", "in.jsonl").stat().st_size,
        }
    _save("memory", "memory", replace(setting, model="tiny-llama", workload=work), rows)


def short_lines(count: int, shape: Shape) -> Workload:
    """Lines of 8 to 16 prompt tokens and 4 generated ones."""
    rng = random.Random(0)
    lines = [([rng.randrange(300, shape.vocabulary) for _ in range(rng.randint(8, 16))], 4) for _ in range(count)]
    return Workload(f"{count} short lines", lines)


def _each(
    budgets: dict[str, SpillwayBudget], setting: Setting, place: Place
) -> Iterator[tuple[str, SpillwayBudget, Outcome, Outcome]]:
    """The name, budget and outcome of one run after the other, and the outcome of the first beside it."""
    first: Outcome | None = None
    for name, budget in budgets.items():
        outcome = _run(name, setting, place, budget)
        first = first or outcome
        yield name, budget, outcome, first


def _run(name: str, setting: Setting, place: Place, budget: SpillwayBudget) -> Outcome:
    print(f"  {name} …", file=sys.stderr, flush=True)
    try:
        outcome = run_spillway(setting, place, budget)
    except PeerError as error:
        raise SystemExit(f"{name}: {error}") from error
    print(f"    {outcome.batch_s:.1f} s", file=sys.stderr, flush=True)
    return outcome


def _save(stem: str, mode: str, setting: Setting, rows: dict[str, dict[str, Any]]) -> None:
    kept = {
        "mode": mode,
        "model": setting.model,
        "workload": setting.workload.name,
        "dtype": setting.dtype,
        "threads": setting.threads,
        "command": ["python", "benchmarks/offline.py", *sys.argv[1:]],
        "machine": machine(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"offline-{stem}.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(table(kept))


def _spill_row(name: str, row: dict[str, Any]) -> str:
    tiers = ((row["report"]["store"] or {}).get("tiers") or {}).values()
    cells = [
        name,
        row["device_kv"],
        f"{row['batch_s']:.1f}",
        f"{row['ratio']:.2f}",
        str(row["report"]["scheduler"]["preemptions"]),
        str(sum(tier["stores"] for tier in tiers)),
        str(sum(tier["hits"] for tier in tiers)),
        f"{row['peak_rss_bytes'] / MIB:.0f}",
        "yes" if row["same_output"] else "**no**",
    ]
    return "| " + " | ".join(cells) + " |"


def _plan_row(name: str, row: dict[str, Any]) -> str:
    store = row["report"]["store"] or {}
    tiers = store.get("tiers") or {}

    def of(tier: str, figure: str) -> int:
        return int((tiers.get(tier) or {}).get(figure, 0))

    cells = [
        name,
        f"{row['batch_s']:.1f}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['report']['prefix_hit_share']:.1%}",
        f"{of('host', 'hits')}",
        f"{of('disk', 'hits')}",
        f"{of('host', 'stored_bytes') / MIB:.0f}",
        f"{of('disk', 'stored_bytes') / MIB:.0f}",
        f"{store.get('spared', 0)}",
        f"{store.get('prefetch_hits', 0)}",
        f"{store.get('late_loads', 0)}",
        "yes" if row["same_output"] else "**no**",
    ]
    return "| " + " | ".join(cells) + " |"


def _pool_row(_: str, row: dict[str, Any]) -> str:
    return (
        f"| {row['pool_bytes'] // MIB:,} | {row['generated_tokens_per_s']:.0f} | {row['preemptions']} "
        f"| {row['peak_rss_bytes'] / MIB:.0f} |"
    )


def _memory_row(_: str, row: dict[str, Any]) -> str:
    return (
        f"| {row['lines']:,} | {row['peak_rss_bytes'] / MIB:.0f} | {row['lines_per_s']:.0f} "
        f"| {row['input_bytes'] / MIB:.2f} |"
    )


SPILL_COLUMNS = ("run", "pool", "batch s", "ratio", "preempted", "spilled", "back", "peak RSS MiB", "same output")
PLAN_COLUMNS = ("run", "batch s", "tokens/s", "found", "from host", "from disk", "to host MiB", "to disk MiB")
PLAN_COLUMNS += ("spared", "ahead", "late", "same output")
TABLES: dict[str, tuple[tuple[str, ...], Callable[[str, dict[str, Any]], str]]] = {
    "spill": (SPILL_COLUMNS, _spill_row),
    "plan": (PLAN_COLUMNS, _plan_row),
    "pool": (("pool MiB", "tokens/s", "preemptions", "peak RSS MiB"), _pool_row),
    "memory": (("lines", "peak RSS MiB", "lines/s", "input MiB"), _memory_row),
}


def table(kept: dict[str, Any]) -> str:
    """A kept result of one of these modes as a markdown table."""
    columns, row = TABLES[kept["mode"]]
    head = f"**{kept['mode']}: {kept['model']}, {kept['workload']}, {kept['dtype']}**, {kept['machine']['processor']}\n"
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([head, *lines, *(row(name, each) for name, each in kept["rows"].items())]) + "\n"
