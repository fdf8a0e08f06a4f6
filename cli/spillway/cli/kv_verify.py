"""`spillway kv verify` and `spillway kv scrub`: read blocks again and check them; scrub also withdraws the bad ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from spillway.cli.kv_target import (
    EXIT_NOT_ALL,
    KvError,
    KvTarget,
    Space,
    call,
    explained,
    living,
    opened,
    parse_hash,
    shares,
    spaces,
    whole_hashes,
)
from spillway.kvstore.errors import NodeUnreachableError, StillLivingError
from spillway.kvstore.identity import BlockHash
from spillway.kvstore.operations.nodes import NodeCall
from spillway.kvstore.operations.shared_index import Node, SharedIndex
from spillway.kvstore.outcomes import MissReason
from spillway.kvstore.peer.wire import Result, Verb
from spillway.kvstore.tiers.disk.audit import ShareView, SlotView, blocks_in, withdraw

Row = dict[str, Any]
_VERDICTS = {Result.DONE: "whole", Result.ABSENT: "gone", Result.DAMAGED: "damaged"}


@dataclass(slots=True)
class _Tally:
    """What was found in one place. ``whole``, ``damaged``, ``gone`` (left meanwhile), ``unread``; and ``withdrawn``."""

    place: str
    counts: Counter[str] = field(default_factory=Counter)
    trouble: str = ""

    @property
    def well(self) -> bool:
        return not (self.trouble or self.counts["damaged"] or self.counts["unread"])


@dataclass(frozen=True, slots=True)
class Verification:
    """``hashes``: only these blocks, all if empty. ``scrub``: withdraw what is damaged."""

    target: KvTarget
    hashes: tuple[str, ...]
    scrub: bool
    as_json: bool

    def run(self) -> int:
        """Do it and print what is bad as it is found; the exit status."""
        starts = [parse_hash(text) for text in self.hashes]
        tallies = []
        with opened(self.target) as index, explained():
            for share in shares(self.target):
                tallies.append(self._share(share, starts))
                self._print_tally(tallies[-1])
            for node, blocks in self._nodes(index, starts):
                tallies.append(self._node(node, blocks))
                self._print_tally(tallies[-1])
        if not tallies:
            raise KvError("there is nothing to read", "See `spillway kv status`.")
        return 0 if all(tally.well for tally in tallies) else EXIT_NOT_ALL

    def _nodes(
        self, index: SharedIndex | None, starts: list[bytes]
    ) -> Iterator[tuple[Node, Iterator[list[BlockHash]]]]:
        if index is None:
            return
        found: list[Space] = spaces(index, self.target)
        for node in living(found, "ask"):
            own = [space for space in found if space.keys == node.keys]
            yield node, iter([whole_hashes(index, own, starts)]) if starts else index.blocks_of(node)

    def _node(self, node: Node, portions: Iterator[list[BlockHash]]) -> _Tally:
        tally = _Tally(node.name)
        try:
            with call(node, self.target.secrets) as connection:
                for blocks in portions:
                    for block, verdict, why in self._ask(connection, blocks):
                        tally.counts[verdict] += 1
                        tally.counts["withdrawn"] += verdict == "damaged" and self.scrub
                        self._print_fault(tally, block, verdict, why)
        except NodeUnreachableError as error:
            tally.trouble = str(error)
        return tally

    def _ask(self, connection: NodeCall, blocks: Sequence[BlockHash]) -> Iterator[tuple[BlockHash, str, str]]:
        if self.scrub:
            for block, result in connection.order(Verb.CHECK, blocks):
                yield block, _VERDICTS.get(result, "unread"), result.name.lower()
            return
        for block, fault in connection.read(blocks):
            yield block, _verdict(fault), fault or ""

    def _share(self, share: ShareView, starts: list[bytes]) -> _Tally:
        tally = _Tally(str(share.path))
        damaged: list[SlotView] = []
        for slot in blocks_in(share, verify=True):
            if starts and not slot.block.startswith(tuple(starts)):
                continue
            verdict = _verdict(slot.fault)
            tally.counts[verdict] += 1
            self._print_fault(tally, slot.block, verdict, f"{slot.fault} in {slot.segment.name} slot {slot.slot}")
            if slot.fault is not None:
                damaged.append(slot)
        if self.scrub and damaged:
            try:
                tally.counts["withdrawn"] = withdraw(share, damaged)
            except StillLivingError as error:
                tally.trouble = f"{error}, which alone may withdraw them: scrub through it, with --kv-index and --node"
        return tally

    def _print_fault(self, tally: _Tally, block: BlockHash, verdict: str, why: str) -> None:
        if verdict in ("whole", "gone"):
            return
        row = {"place": tally.place, "block": block.hex(), "verdict": verdict, "reason": why}
        shown = block.hex() or "a block without a readable name"
        print(json.dumps(row) if self.as_json else f"{verdict}: {shown} at {tally.place}: {why}", flush=True)

    def _print_tally(self, tally: _Tally) -> None:
        names = ("whole", "damaged", "unread", "gone", *(("withdrawn",) if self.scrub else ()))
        counts = {name: tally.counts[name] for name in names}
        if self.as_json:
            print(json.dumps({"place": tally.place, **counts, "trouble": tally.trouble}), flush=True)
            return
        shown = ", ".join(
            f"{count:,} {name}" for name, count in counts.items() if count or name in ("whole", "damaged")
        )
        print(f"{tally.place}: {shown}" + (f"\n{tally.place}: {tally.trouble}" if tally.trouble else ""), flush=True)


def _verdict(fault: MissReason | None) -> str:
    if fault is None:
        return "whole"
    if fault is MissReason.ABSENT:
        return "gone"
    return "damaged" if fault.damaged else "unread"
