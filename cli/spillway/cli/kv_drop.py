"""`spillway kv drop`: nodes, identities, blocks and directories, after a look at what that means."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import typer

from spillway.cli.kv_target import (
    EXIT_NOT_ALL,
    KvError,
    KvTarget,
    Space,
    call,
    explained,
    opened,
    parse_hash,
    shares,
    spaces,
    whole_hashes,
)
from spillway.cli.sizes import format_size
from spillway.kvstore.errors import KVStoreError
from spillway.kvstore.identity import BlockHash
from spillway.kvstore.operations.removal import forget_node, remove_namespace
from spillway.kvstore.operations.shared_index import Node, SharedIndex
from spillway.kvstore.peer.wire import Result, Verb
from spillway.kvstore.tiers.disk.audit import ShareView, blocks_in, empty, withdraw


@dataclass(frozen=True, slots=True)
class _Step:
    """Something to drop. ``what``: for people, before. ``run``: do it and tell what was done."""

    what: str
    run: Callable[[], str]


def drop(target: KvTarget, hashes: Sequence[str], *, sure: bool, as_json: bool) -> int:
    """Drop after a confirmation; the exit status."""
    if not (hashes or target.nodes or target.identity or target.disk_dir):
        raise KvError("what is to be dropped?", "Give hashes, --node, --identity or --disk-dir.")
    starts = [parse_hash(text) for text in hashes]
    with opened(target) as index, explained():
        steps = [] if index is None else _index_steps(index, target, starts)
        steps += _disk_steps(target, starts)
        if not steps:
            raise KvError("there is nothing to drop", "See `spillway kv status`.")
        _confirm(steps, sure=sure)
        failed = False
        for step in steps:
            try:
                done, error = step.run(), ""
            except KVStoreError as trouble:
                done, error, failed = "", str(trouble), True
            if as_json:
                print(json.dumps({"drop": step.what, "done": done, "error": error}), flush=True)
            else:
                print(f"{step.what}: {done or f'not done: {error}'}", flush=True)
    return EXIT_NOT_ALL if failed else 0


def _confirm(steps: Sequence[_Step], *, sure: bool) -> None:
    """Raises KvError if nobody is there to ask, typer.Exit if the answer is no."""
    if sure:
        return
    print("To be dropped; what is needed again will be computed again:", file=sys.stderr)
    for step in steps:
        print(f"  {step.what}", file=sys.stderr)
    if not sys.stdin.isatty():
        raise KvError("nothing was dropped: nobody is here to confirm it", "Add --yes.")
    if not typer.confirm("Go on?", err=True):
        raise typer.Exit(1)


def _index_steps(index: SharedIndex, target: KvTarget, starts: list[bytes]) -> list[_Step]:
    if not (starts or target.nodes or target.identity):
        return []
    found = spaces(index, target)
    if starts:
        wanted = {space.keys: whole_hashes(index, [space], _known_here(index, space, starts)) for space in found}
        return [
            _order(target, node, wanted[space.keys], f"{len(wanted[space.keys])} blocks from {node.name}")
            for space in found
            for node in space.nodes
            if node.live and node.address and wanted[space.keys]
        ]
    steps = []
    for space in found:
        if not target.nodes and not any(node.live for node in space.nodes):
            what = f"identity {space.keys.namespace}: its {len(space.nodes)} dead nodes and all their entries"
            steps.append(_Step(what, lambda keys=space.keys: f"{remove_namespace(index, keys):,} keys deleted"))  # type: ignore[misc]  # mypy infers no lambda with a default
            continue
        steps += [_node_step(index, target, node) for node in space.nodes]
    return steps


def _known_here(index: SharedIndex, space: Space, starts: list[bytes]) -> list[bytes]:
    """Only what this identity has: a hash belongs to one."""
    return list(index.find(space.keys, space.nodes, starts))


def _node_step(index: SharedIndex, target: KvTarget, node: Node) -> _Step:
    if not node.live:
        what = f"dead node {node.name} of identity {node.keys.namespace}: its name and entries"
        return _Step(what, lambda: f"{forget_node(index, node):,} entries deleted")
    blocks = [block for portion in index.blocks_of(node) for block in portion]
    return _order(target, node, blocks, f"all {len(blocks):,} blocks of living node {node.name}, from memory and disk")


def _order(target: KvTarget, node: Node, blocks: Sequence[BlockHash], what: str) -> _Step:
    def run() -> str:
        with call(node, target.secrets) as connection:
            results = [result for _, result in connection.order(Verb.DROP, blocks)]
        return f"{results.count(Result.DONE):,} dropped, {results.count(Result.ABSENT):,} were not there"

    return _Step(what, run)


def _disk_steps(target: KvTarget, starts: list[bytes]) -> list[_Step]:
    """Of idle shares. Those in use belong to their stores, which are asked through the index."""
    if target.nodes:
        return []
    idle = [share for share in shares(target) if not share.holder]
    return [_share_step(share, starts) for share in idle]


def _share_step(share: ShareView, starts: list[bytes]) -> _Step:
    if not starts:
        what = f"{share.path}: {format_size(share.bytes)} of weights {share.weights[:12] or '?'}"
        return _Step(what, lambda: f"{format_size(empty(share))} freed")
    slots = [slot for slot in blocks_in(share, verify=False) if slot.block.startswith(tuple(starts))]
    return _Step(f"{share.path}: {len(slots)} blocks", lambda: f"{withdraw(share, slots):,} dropped")
