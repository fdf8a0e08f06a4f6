"""What agents' own /metrics pages say of their stores."""

from __future__ import annotations

import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from spillway.kvstore.operations.shared_index import Node

TIMEOUT_S = 2.0
_MOST_BYTES = 4 << 20
_BREAKER = {0.0: "closed", 1.0: "probing", 2.0: "open"}
_TIER = "spillway_kv_tier_"


@dataclass(slots=True)
class TierFigures:
    """One tier since its agent started. ``breaker``: closed, probing or open."""

    blocks: int = 0
    bytes: int = 0
    budget_bytes: int = 0
    hits: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    verify_failures: int = 0
    breaker: str = ""


@dataclass(slots=True)
class Figures:
    """One agent's store since it started. ``asked``: blocks asked for; ``delivered``: those that some tier had."""

    asked: int = 0
    delivered: int = 0
    tiers: dict[str, TierFigures] = field(default_factory=dict)

    @property
    def hit_share(self) -> float | None:
        """Of the blocks asked for; None if none was."""
        return self.delivered / self.asked if self.asked else None


def figures_of(nodes: Sequence[Node]) -> dict[tuple[str, str], Figures | str]:
    """By namespace and name; a text says why there are none. Asked at once, none for longer than `TIMEOUT_S`."""
    asked = [node for node in nodes if node.live]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(_fetch, asked))
    return {(node.keys.namespace, node.name): answer for node, answer in zip(asked, answers, strict=True)}


def _fetch(node: Node) -> Figures | str:
    if not node.about.metrics:
        return "it told of no page for metrics: start it with --health-listen"
    try:
        with urllib.request.urlopen(f"http://{node.about.metrics}/metrics", timeout=TIMEOUT_S) as answer:
            return parse(answer.read(_MOST_BYTES).decode())
    except (OSError, ValueError) as error:
        return f"http://{node.about.metrics}/metrics: {error}"


def parse(text: str) -> Figures:
    """Read a page. Raises ValueError for one that is no page of metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    found = Figures()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            _enter(found, sample.name, sample.labels, sample.value)
    return found


def _enter(found: Figures, name: str, labels: dict[str, str], value: float) -> None:
    if name == "spillway_kv_gets_total":
        found.asked = int(value)
    elif name == "spillway_kv_recomputes_avoided_total":
        found.delivered = int(value)
    if not name.startswith(_TIER) or "tier" not in labels:
        return
    tier = found.tiers.setdefault(labels["tier"], TierFigures())
    what = name.removeprefix(_TIER).removesuffix("_total")
    if what == "misses":
        tier.misses[labels["reason"]] = int(value)
    elif what == "breaker_state":
        tier.breaker = _BREAKER.get(value, "")
    elif what in ("blocks", "bytes", "budget_bytes", "hits", "verify_failures"):
        setattr(tier, what, int(value))
