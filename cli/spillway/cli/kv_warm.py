"""`spillway kv warm`: have a living agent bring blocks to its host memory before it needs them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spillway.cli.kv_target import (
    EXIT_NOT_ALL,
    KvError,
    KvTarget,
    call,
    explained,
    living,
    opened,
    parse_hash,
    spaces,
    whole_hashes,
)
from spillway.kvstore.identity import BlockHash
from spillway.kvstore.operations.nodes import NodeCall
from spillway.kvstore.peer.wire import Result, Verb

if TYPE_CHECKING:
    from spillway.cli.kv_chains import JobLines

_AGAIN_S = 0.1


def warm(target: KvTarget, hashes: Sequence[str], job: JobLines | None, *, timeout_s: float, as_json: bool) -> int:
    """Do it for each of the target's nodes; the exit status."""
    if not target.nodes:
        raise KvError("whose memory is to be warmed?", "Give --node, once or more.")
    blocks: list[BlockHash] = []
    if job is not None:
        from spillway.cli.kv_chains import chains_of

        identity, chains = chains_of(job)
        target = replace(target, identity=identity.digest().hex())
        blocks = list(dict.fromkeys(block for chain in chains for block in chain.blocks))
    starts = [parse_hash(text) for text in hashes]
    complete = True
    with opened(target) as index, explained():
        assert index is not None  # nodes were named, so there is one
        found = spaces(index, target)
        wanted = blocks + whole_hashes(index, found, starts)
        if not wanted:
            raise KvError("which blocks?", "Give hashes, or --model and --input.")
        for node in living(found, "warm"):
            with call(node, target.secrets) as connection:
                counts = _warm(connection, wanted, time.monotonic() + timeout_s)
            complete &= counts[Result.DONE] == len(wanted)
            row = {
                "node": node.name,
                "in_host_memory": counts[Result.DONE],
                "not_found": counts[Result.ABSENT],
                "not_taken": counts[Result.PENDING] + counts[Result.FAILED],
            }
            print(
                json.dumps(row)
                if as_json
                else f"{node.name}: {row['in_host_memory']} of {len(wanted)} blocks in host memory, "
                f"{row['not_found']} found nowhere, {row['not_taken']} not taken in time: no room for them, or no tier "
                "for host memory"
            )
    return 0 if complete else EXIT_NOT_ALL


def _warm(connection: NodeCall, blocks: Sequence[BlockHash], until: float) -> Counter[Result]:
    """Order until nothing is on its way any more: an agent takes only so many at once."""
    ended: Counter[Result] = Counter()
    left = list(blocks)
    while left:
        results = list(connection.order(Verb.WARM, left))
        left = [block for block, result in results if result is Result.PENDING]
        ended.update(result for _, result in results if result is not Result.PENDING)
        if time.monotonic() >= until:
            break
        if left:
            time.sleep(_AGAIN_S)
    ended[Result.PENDING] = len(left)
    return ended
