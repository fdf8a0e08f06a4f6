"""What `benchmarks/service/` and the gateway's chaos run kept, as markdown tables."""

from __future__ import annotations

from statistics import median
from typing import Any


def load_table(kept: list[dict[str, Any]]) -> str:
    """Of `load.py`: what the gateway bears."""
    columns = (
        "lines",
        "watchers",
        "taken in, lines/s",
        "drained, lines/s",
        "Lease p50, p99 ms",
        "Complete p50, p99 ms",
    )
    columns += ("gateway's memory at half, end, most: MiB", "gateway's CPU µs a line: in, drain, seal")
    rows = []
    for each in kept:
        calls, memory, cpu = each["call_ms"], each["gateway_rss_mib"], each["gateway_cpu_us_per_line"]
        rows.append(
            [
                f"{each['lines']:,}",
                f"{each['watchers']:,}",
                f"{each['lines'] / (each['upload_s'] + each['intake_s']):,.0f}",
                f"{each['lines_per_s']:,.0f}",
                *(f"{calls[name]['p50']:.0f}, {calls[name]['p99']:.0f}" for name in ("lease", "complete")),
                ", ".join(f"{memory[f'anonymous at {when}']:.0f}" for when in ("half", "the end", "most")),
                ", ".join(f"{each_us:.0f}" for each_us in cpu.values()),
            ]
        )
    return _table(kept[0]["machine"], columns, rows)


def stream_table(kept: dict[str, Any]) -> str:
    """Of `stream.py`: how fast results leave, medians of the rounds."""
    figures = kept["figures"]
    columns = ("what", *(f"rows of {each['row_bytes']:,} bytes: MiB/s" for each in figures), "server's CPU s a GiB")
    rows = [
        [
            name,
            *(f"{median(each['rates'][name]):,.0f}" for each in figures),
            ", ".join(f"{median(each['server_cpu_s_per_gib'][name]):.1f}" for each in figures),
        ]
        for name in figures[0]["rates"]
    ]
    return _table(kept["machine"], columns, rows)


def exactly_once_table(kept: list[dict[str, Any]]) -> str:
    """Of `tests/gateway/chaos.py`: what befell a job, and what came of it. A run that breaks its word keeps nothing."""
    columns = ("lines", "seed", "gateways", "killed", "owners", "workers killed", "bytes torn off the log")
    columns += ("lines with exactly one result", "equal to a quiet run")
    rows = [
        [
            f"{plan['lines']:,}",
            str(plan["seed"]),
            str(plan["gateways"]),
            str(report["gateway_kills"]),
            str(report["owners"]),
            str(report["worker_kills"]),
            f"{report['torn_bytes']:,}",
            f"{each['lines_with_exactly_one_result']:,}",
            "yes" if each["equal_to_quiet_run"] else "**no**",
        ]
        for each in kept
        for plan, report in [(each["plan"], each["report"])]
    ]
    return _table(None, columns, rows)


TABLES = {
    "service-load": load_table,
    "service-stream": stream_table,
    "service-exactly-once": exactly_once_table,
}
"""By the name of the file of results."""


def _table(machine: dict[str, Any] | None, columns: tuple[str, ...], rows: list[list[str]]) -> str:
    head = [] if machine is None else [f"{machine['processor']}, {machine['cpus']} CPUs\n"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (list(columns), *rows)]
    return "\n".join([*head, lines[0], "|---" + "|---:" * (len(columns) - 1) + "|", *lines[1:]]) + "\n"
