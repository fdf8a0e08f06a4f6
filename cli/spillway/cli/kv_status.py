"""`spillway kv status`: who has which blocks, and how well that goes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from spillway.cli.kv_figures import Figures, figures_of
from spillway.cli.kv_target import KvTarget, Space, explained, opened, shares, spaces
from spillway.cli.progress import format_duration
from spillway.cli.sizes import format_size
from spillway.kvstore.operations.shared_index import Census, Node, SharedIndex
from spillway.kvstore.tiers.disk.audit import ShareView, blocks_in

Row = dict[str, Any]


def status(target: KvTarget, *, as_json: bool) -> int:
    """Show it; the exit status."""
    found: Row = {}
    with opened(target) as index:
        if index is not None:
            found["redis"] = index.where
            found["identities"] = [_space(index, space) for space in spaces(index, target)]
    with explained():
        if target.disk_dir is not None:
            found["disk"] = {"directory": str(target.disk_dir), "shares": [_share(each) for each in shares(target)]}
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    if "redis" in found:
        _print_index(found)
    if "disk" in found:
        _print_disk(found["disk"])
    return 0


def _space(index: SharedIndex, space: Space) -> Row:
    census = index.census(space.keys, space.nodes)
    figures = figures_of(space.nodes)
    about = next((node.about for node in space.nodes if node.about.identity), None)
    return {
        "namespace": space.keys.namespace,
        "identity": about.identity if about else "",
        "weights": about.weights if about else "",
        "dtype": about.dtype if about else "",
        "rank": about.rank if about else "",
        "block_bytes": space.block_bytes,
        "blocks": census.blocks,
        "stale_entries": sum(census.stale.values()),
        "nodes": [
            _node(node, census, space.block_bytes, figures.get((space.keys.namespace, node.name)))
            for node in space.nodes
        ],
    }


def _node(node: Node, census: Census, block_bytes: int, figures: Figures | str | None) -> Row:
    return {
        "node": node.name,
        "live": node.live,
        "lease_s": round(node.lease_s, 1),
        "generation": node.generation,
        "address": node.address,
        "metrics": node.about.metrics,
        "tiers": {
            tier: {"blocks": blocks, "block_bytes": blocks * block_bytes}
            for tier, blocks in census.held.get(node.number, {}).items()
        },
        "stale_entries": census.stale.get(node.number, 0),
        "figures": asdict(figures) | {"hit_share": figures.hit_share} if isinstance(figures, Figures) else None,
        "no_figures": figures if isinstance(figures, str) else "",
    }


def _share(share: ShareView) -> Row:
    blocks = foreign = 0
    for slot in blocks_in(share, verify=False):
        own = slot.identity.hex() == share.identity
        blocks += own
        foreign += not own
    return {
        "share": share.path.name,
        "open_in": share.holder,
        "generation": share.generation,
        "identity": share.identity,
        "weights": share.weights,
        "dtype": share.dtype,
        "blocks": blocks,
        "foreign_blocks": foreign,
        "bytes": share.bytes,
    }


def _print_index(found: Row) -> None:
    if not found["identities"]:
        print(f"Redis at {found['redis']} knows no blocks: no agent has entered any, or it was emptied.")
    for space in found["identities"]:
        size = format_size(space["block_bytes"]) if space["block_bytes"] else "unknown size"
        print(
            f"weights {space['weights'][:12] or '?'} in {space['dtype'] or '?'}, rank {space['rank'] or '?'}, "
            f"blocks of {size}; identity {space['namespace']}"
        )
        _print_nodes(space["nodes"])
        live = sum(node["live"] for node in space["nodes"])
        stale = space["stale_entries"]
        cleaning = "a living node deletes them" if live else "no node lives to delete them; see kv drop"
        print(
            f"{live} of {len(space['nodes'])} nodes live; {space['blocks']:,} different blocks"
            + (f"; {stale:,} stale entries, invisible to look-ups: {cleaning}" if stale else "")
            + "\n"
        )


def _print_nodes(nodes: list[Row]) -> None:
    tiers = list(dict.fromkeys(tier for node in nodes for tier in node["tiers"]))
    table = Table("node", "lease", "gen", "serves at", *tiers, "stale", "hits", "trouble", box=None)
    for node in nodes:
        lease = f"{node['lease_s']:.0f} s" if node["live"] else f"ended {format_duration(-node['lease_s'])} ago"
        held = [_amount(node["tiers"].get(tier)) for tier in tiers]
        hits, trouble = _health(node)
        stale = f"{node['stale_entries']:,}" if node["stale_entries"] else "-"
        table.add_row(node["node"], lease, str(node["generation"]), node["address"] or "-", *held, stale, hits, trouble)
    _console().print(table)


def _console() -> Console:
    """Wide where it is no terminal: what is piped must not be cut."""
    return Console(width=None if sys.stdout.isatty() else 250)


def _amount(tier: Row | None) -> str:
    if not tier or not tier["blocks"]:
        return "-"
    return f"{tier['blocks']:,} ({format_size(tier['block_bytes'])})"


def _health(node: Row) -> tuple[str, str]:
    figures = node["figures"]
    if figures is None:
        return "-", node["no_figures"] or "-"
    share = figures["hit_share"]
    trouble = []
    for name, tier in figures["tiers"].items():
        if tier["breaker"] != "closed":
            trouble.append(f"{name} breaker {tier['breaker']}")
        if tier["verify_failures"]:
            trouble.append(f"{name}: {tier['verify_failures']:,} damaged")
        trouble += [f"{name}: {count:,} {why}" for why, count in tier["misses"].items() if why in _WORRYING]
    return "-" if share is None else f"{share:.0%}", ", ".join(trouble) or "-"


_WORRYING = ("io_error", "deadline", "refused", "internal", "key")


def _print_disk(disk: Row) -> None:
    print(disk["directory"])
    table = Table("share", "open in", "gen", "weights", "dtype", "blocks", "of others", "takes", box=None)
    for row in disk["shares"]:
        table.add_row(
            row["share"],
            row["open_in"] or "-",
            str(row["generation"]),
            row["weights"][:12] or "-",
            row["dtype"] or "-",
            f"{row['blocks']:,}",
            f"{row['foreign_blocks']:,}",
            format_size(row["bytes"]),
        )
    _console().print(table)
