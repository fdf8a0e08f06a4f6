#!/usr/bin/env python3
"""Eviction by the job's plan against LRU and ARC, and how far each is from the optimum.

    python benchmarks/kvstore/planning.py

The job is the shipped batch of questions over long documents (``examples/documents``), with words for tokens: 64 lines
over four contexts that take turns. (`spillway run` orders lines by prefix where it may, and then hardly needs a store:
this is for orders that are given.) A second job has 400 lines over 40 documents of Zipf-distributed popularity, in
random order as from a queue.

A device pool is simulated (LRU, a given share of the job's different blocks); what it lacks is asked of a real
`BlockStore` with a host tier of a given size, and what leaves it is put there, where the store wants it, the blocks of
generated tokens included. So the sequence of requests is the same for all policies. A block counts as a hit if the
store delivers it and all blocks of the line before it. ``belady`` is Belady's rule with bypass on that very sequence,
knowing every lookup to come and not just the plan, exclusive, of one line the shallowest blocks first, and with hits
counted in the same way. ``bound`` counts all that it holds at a lookup, each block on its own: no policy can have more.
"""

from __future__ import annotations

import heapq
import random
import re
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from figures import IDENTITY, report

from spillway.kvstore import BlockHash, BlockStore, Deadlines, JobPlan, StoreConfig, block_hash

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "documents"))

from make_batch import interleaved, questions

BLOCK_TOKENS = 16
BLOCK_BYTES = 64
GENERATED_BLOCKS = 3
SEED = 1
NEVER = 1 << 60

Chain = list[BlockHash]


@dataclass
class Trace:
    """What a store is asked in a job: per line the blocks looked up in order, then the blocks put."""

    chains: list[Chain]
    lookups: list[Chain] = field(default_factory=list)
    puts: list[Chain] = field(default_factory=list)
    different: int = 0


def chain_of(tokens: Sequence[int]) -> Chain:
    """Names of a prompt's full blocks."""
    blocks, parent = [], IDENTITY.root()
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = block_hash(parent, tokens[start : start + BLOCK_TOKENS])
        blocks.append(parent)
    return blocks


def shipped_batch() -> list[Chain]:
    """The long part of the shipped batch, in the order of its file."""
    chains = []
    for question in interleaved(questions("long")):
        text = " ".join(str(message["content"]) for message in question.line()["body"]["messages"])
        chains.append(chain_of([zlib.crc32(word.encode()) for word in re.findall(r"\w+|[^\w\s]", text)]))
    return chains


def queue_batch(rng: random.Random) -> list[Chain]:
    """Questions in random order over documents of which few are popular."""
    documents = [[rng.randrange(1 << 31) for _ in range(rng.randrange(500, 2500))] for _ in range(40)]
    weights = [1 / (rank + 1) for rank in range(len(documents))]
    chosen = rng.choices(documents, weights, k=400)
    return [chain_of(document + [rng.randrange(1 << 31) for _ in range(48)]) for document in chosen]


def trace_of(chains: list[Chain], device_share: float) -> Trace:
    """Run the lines through a simulated device pool."""
    trace = Trace(chains, different=len({block for chain in chains for block in chain}))
    slots = max(int(trace.different * device_share), max(len(chain) for chain in chains) + GENERATED_BLOCKS)
    device: OrderedDict[BlockHash, None] = OrderedDict()
    for number, chain in enumerate(chains):
        present = next((at for at, block in enumerate(chain) if block not in device), len(chain))
        generated = [block_hash(chain[-1], [number, at]) for at in range(GENERATED_BLOCKS)]
        for block in reversed(chain + generated):
            device[block] = None
            device.move_to_end(block)
        leaving = [device.popitem(last=False)[0] for _ in range(max(0, len(device) - slots))]
        trace.lookups.append(chain[present:])
        trace.puts.append(leaving[::-1])
    return trace


def replay(trace: Trace, config: StoreConfig, *, planned: bool) -> tuple[int, int]:
    """Hits, and blocks written to disk, of a real store. ``planned``: it follows the plan, which is whole."""
    hits = 0
    data, out = np.zeros(BLOCK_BYTES, np.uint8), np.zeros(BLOCK_BYTES, np.uint8)
    with BlockStore.open(config) as store:
        following = store.follow(JobPlan(trace.chains, whole=True) if planned else None)
        for number, (lookups, puts) in enumerate(zip(trace.lookups, trace.puts, strict=True)):
            count = store.match(lookups)
            hits += sum(store.get_many([(block, out) for block in lookups[:count]]))
            following.advance(number + 1)
            following.took(lookups)
            store.put_many([(block, data) for block in puts if following.lets_go(block) or not planned])
        store.flush()
        store.check()
        written = store.stats().tiers["disk"].stores if config.disk_dir else 0
    return hits, written


@dataclass(frozen=True)
class Optimum:
    """Hits of Belady's rule: with every held block counted, and with those only that follow no missing one."""

    each: int
    prefixes: int


def optimum(trace: Trace, slots: int) -> Optimum:
    """Belady's rule (1966) with bypass: keep the blocks whose next lookup comes first, of one line the shallowest."""
    next_lookup: dict[BlockHash, list[int]] = {}
    for number, chain in enumerate(trace.lookups):
        for block in chain:
            next_lookup.setdefault(block, []).append(number)
    for times in next_lookup.values():
        times.reverse()
    depths = {block: depth for chain in trace.chains for depth, block in enumerate(chain)}
    held: dict[BlockHash, tuple[int, int]] = {}
    furthest: list[tuple[int, int, BlockHash]] = []
    each = prefixes = 0

    def keep(block: BlockHash) -> None:
        times = next_lookup.get(block)
        held[block] = (times[-1] if times else NEVER, depths.get(block, 0))
        heapq.heappush(furthest, (-held[block][0], -held[block][1], block))
        while len(held) > slots:
            line, depth, coldest = heapq.heappop(furthest)
            if held.get(coldest) == (-line, -depth):
                del held[coldest]

    for lookups, puts in zip(trace.lookups, trace.puts, strict=True):
        unbroken = True
        for block in lookups:
            next_lookup[block].pop()
            hit = held.pop(block, None) is not None  # the device has it now, and puts it before it asks again
            unbroken = unbroken and hit
            each += hit
            prefixes += unbroken
        for block in puts:
            keep(block)
    return Optimum(each, prefixes)


def rows() -> Iterator[dict[str, object]]:
    """One per job, order and size of the host tier."""
    shipped = shipped_batch()
    jobs: dict[str, list[Chain]] = {
        "documents, as filed": shipped,
        "queue, 40 documents": queue_batch(random.Random(SEED)),
    }
    for job, chains in jobs.items():
        trace = trace_of(chains, 0.1)
        seen: set[BlockHash] = set()
        reachable = 0
        for lookups, puts in zip(trace.lookups, trace.puts, strict=True):
            reachable += sum(block in seen for block in lookups)
            seen.update(puts)
        for share in (0.1, 0.25, 0.5, 0.75):
            slots = int(trace.different * share)
            host = StoreConfig(BLOCK_BYTES, IDENTITY, host_bytes=slots * (4096 + 1024))
            best = optimum(trace, slots)
            lru, arc = (
                replay(trace, host, planned=False)[0],
                replay(trace, replace(host, eviction="arc"), planned=False)[0],
            )
            planned = replay(trace, host, planned=True)[0]
            with TemporaryDirectory() as directory:
                written = [
                    replay(trace, on_disk(host, Path(directory) / str(follow), trace), planned=follow)[1]
                    for follow in (False, True)
                ]
            yield {
                "job": job,
                "host blocks": slots,
                "reachable": reachable,
                "lru": lru / reachable if reachable else None,
                "arc": arc / reachable if reachable else None,
                "planned": planned / reachable if reachable else None,
                "belady": best.prefixes / reachable if reachable else None,
                "of belady": planned / best.prefixes if best.prefixes else None,
                "lru of belady": lru / best.prefixes if best.prefixes else None,
                "bound": best.each / reachable if reachable else None,
                "disk writes, lru": written[0],
                "disk writes, planned": written[1],
            }


def on_disk(host: StoreConfig, directory: Path, trace: Trace) -> StoreConfig:
    """The same host tier above a disk that holds everything."""
    blocks = trace.different + GENERATED_BLOCKS * len(trace.lookups)
    return replace(
        host,
        disk_bytes=(blocks + 64) * 8400 + (1 << 20),
        disk_dir=directory,
        disk_free_floor_bytes=0,
        deadlines=Deadlines(put_s=60),
    )


if __name__ == "__main__":
    settings = {"device share": 0.1, "block tokens": BLOCK_TOKENS, "generated blocks": GENERATED_BLOCKS, "seed": SEED}
    report("hits as a share of what was put and asked for again", list(rows()), settings)
