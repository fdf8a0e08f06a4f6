"""The tables in the documentation, written from the kept results so that neither can go stale."""

from __future__ import annotations

import json
import re

from harness import modes, results, service_tables
from harness.models import CHECKOUT

PAGES = tuple(CHECKOUT / "docs" / page for page in ("performance.md", "kernels.md", "kv.md", "service.md"))
_BLOCK = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table_of(name: str) -> str:
    """The table of a kept result, by its file's name without the ending."""
    path = results.RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    kept = json.loads(path.read_text())
    if name == "kernels-cpu-attention":
        return results.attention_table(kept)
    if name in service_tables.TABLES:
        return service_tables.TABLES[name](kept)
    if name.startswith("kvstore-"):
        return results.store_table(kept)
    return results.table(kept) if "peers" in kept else modes.table(kept)


def filled(text: str) -> str:
    """The page with every marked table as the results have it."""
    return _BLOCK.sub(lambda found: found[1] + table_of(found["name"]) + found[3], text)
