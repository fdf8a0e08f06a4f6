"""`spillway kv where`: the places of blocks, named by hash or as those of a job's prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from spillway.cli.kv_target import EXIT_NOT_ALL, KvTarget, explained, opened, parse_hash, shares, spaces
from spillway.kvstore.identity import HASH_BYTES, BlockHash
from spillway.kvstore.operations.shared_index import SharedIndex
from spillway.kvstore.tiers.disk.audit import blocks_in

if TYPE_CHECKING:
    from spillway.cli.kv_chains import Chain, JobLines

Row = dict[str, Any]


class _Places:
    """Looks blocks up in the index and in a disk directory."""

    def __init__(self, target: KvTarget, index: SharedIndex | None) -> None:
        self._index = index
        self._spaces = [] if index is None else spaces(index, target)
        self._on_disk: dict[BlockHash, list[Row]] = {}
        for share in shares(target):
            for slot in blocks_in(share, verify=False):
                place = {"share": share.path.name, "segment": slot.segment.name, "slot": slot.slot}
                self._on_disk.setdefault(slot.block, []).append(place)

    def find(self, starts: Sequence[bytes]) -> list[Row]:
        """The blocks whose hash is, or begins with, one of ``starts``; an empty row for a start that none has."""
        rows: dict[bytes, Row] = {}
        for space in self._spaces:
            assert self._index is not None  # it is where the spaces came from
            for block, places in self._index.find(space.keys, space.nodes, starts).items():
                row = rows.setdefault(block, _row(block))
                row["places"] += [
                    {"node": place.node.name, "tiers": list(place.tiers), "address": place.node.address}
                    for place in places
                    if place.node is not None and not place.stale
                ]
                row["stale_entries"] += sum(place.stale for place in places)
        for start in starts:
            whole = [BlockHash(start)] if len(start) == HASH_BYTES else list(self._on_disk)
            for block in whole:
                if block in self._on_disk and block.startswith(start):
                    rows.setdefault(block, _row(block))["files"] = self._on_disk[block]
        return [row for start in starts for row in _of(rows, start)]


def where(target: KvTarget, hashes: list[str], *, as_json: bool) -> int:
    """Show blocks by hash; the exit status."""
    starts = [parse_hash(text) for text in hashes]
    with opened(target) as index, explained():
        rows = _Places(target, index).find(starts)
    for row in rows:
        print(json.dumps(row) if as_json else f"{row['block']}  {_text(row)}")
    return 0 if all(_found(row) for row in rows) else EXIT_NOT_ALL


def where_lines(target: KvTarget, job: JobLines, *, as_json: bool) -> int:
    """Show the blocks of a job's prompts; the exit status."""
    from spillway.cli.kv_chains import chains_of

    identity, chains = chains_of(job)
    target = replace(target, identity=identity.digest().hex())
    complete = True
    with opened(target) as index, explained():
        places = _Places(target, index)
        for chain in chains:
            complete &= _show(chain, places.find(chain.blocks), job.block_tokens, as_json=as_json)
    return 0 if complete else EXIT_NOT_ALL


def _show(chain: Chain, rows: list[Row], block_tokens: int, *, as_json: bool) -> bool:
    """One prompt; whether all of it was found."""
    lead = next((number for number, row in enumerate(rows) if not _found(row)), len(rows))
    about = {"line": chain.line, "custom_id": chain.custom_id, "prompt_tokens": chain.prompt_tokens}
    if as_json:
        print(json.dumps(about | {"block_tokens": block_tokens, "found_from_start": lead, "blocks": rows}))
        return lead == len(rows)
    print(
        f"line {chain.line} ({chain.custom_id}): {chain.prompt_tokens} tokens; the first {lead} of {len(rows)} full "
        f"blocks, {lead * block_tokens} tokens, are found"
    )
    for text, run in groupby(enumerate(rows), key=lambda each: _text(each[1])):
        numbers = [(number, row["block"]) for number, row in run]
        last = f"-{numbers[-1][0]}" if len(numbers) > 1 else ""
        print(f"  block {numbers[0][0]}{last} ({numbers[0][1][:16]}…): {text}")
    return lead == len(rows)


def _row(block: bytes) -> Row:
    return {"block": block.hex(), "places": [], "files": [], "stale_entries": 0}


def _of(rows: dict[bytes, Row], start: bytes) -> list[Row]:
    if len(start) == HASH_BYTES:
        return [rows.get(start) or _row(start)]
    return [row for block, row in rows.items() if block.startswith(start)] or [_row(start)]


def _found(row: Row) -> bool:
    return bool(row["places"] or row["files"])


def _text(row: Row) -> str:
    parts = [f"{place['node']} ({', '.join(place['tiers'])})" for place in row["places"]]
    parts += sorted({f"{place['share']} on disk" for place in row["files"]})
    parts += [f"{row['stale_entries']} stale entries"] if row["stale_entries"] else []
    return ", ".join(parts) or "nowhere"
