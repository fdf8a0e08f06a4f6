#!/usr/bin/env python3
"""The CPU path's paged attention beside torch SDPA on contiguous KV (what transformers calls), in one run.

    python benchmarks/kernels/cpu_attention.py [--threads N] [--seconds S] [--only prefill decode]

Both sides compute the same numbers for the same sequences, through all layers of a pool that no cache holds, and take
turns for ``--seconds``; the best round of each counts, since a machine that is shared is only ever slower. SDPA gets
its best case: keys and values already concatenated, grouped heads without copies (``enable_gqa``), and for lengths that
differ the padding and the mask that a batch of transformers' has. Its decode is also timed with keys repeated for each
query head first, as transformers does where a mask rules grouped heads out; the faster of the two counts.

Decode is counted in GB/s of the keys and values that must be read (real tokens only) and as a share of the read
bandwidth; prefill in GFLOP/s of the causal part and as a share of the float32 matmul rate. Both limits are measured
between the rounds of every cell, and the best of the run counts. "error" is each side's root mean square against
float64, relative to the result's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.results import RESULTS, attention_table, machine

from spillway.kernels import flash_prefill, paged_decode
from spillway.kernels.params import AttentionParams

BLOCK_TOKENS = 16
SWEEP_BYTES = 400 << 20
"""Keys and values read in a round: far more than any cache holds."""
HEADS = {"16/8 x 64": (16, 8, 64), "9/3 x 64": (9, 3, 64), "32/8 x 128": (32, 8, 128)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Round = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Some sequences in one layer shape: ``queries`` rows each at the end of contexts between the two lengths."""

    op: str
    heads: str
    dtype: str
    sequences: int
    shortest: int
    longest: int

    def contexts(self) -> list[int]:
        """Tokens of each sequence, seeded."""
        chosen = random.Random(0)
        return [chosen.randint(self.shortest, self.longest) for _ in range(self.sequences)]


class Ground:
    """One case's data, paged and contiguous, the same numbers in both."""

    def __init__(self, case: Case) -> None:
        self.query_heads, self.kv_heads, self.dim = HEADS[case.heads]
        self.contexts, self.dtype = case.contexts(), DTYPES[case.dtype]
        token_bytes = 2 * self.kv_heads * self.dim * self.dtype.itemsize
        self.layer_bytes = sum(self.contexts) * token_bytes
        self.layers = max(1, -(-SWEEP_BYTES // self.layer_bytes)) if case.op == "decode" else 2
        blocks = [-(-tokens // BLOCK_TOKENS) for tokens in self.contexts]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).int()
        shape = (sum(blocks), self.layers, 2, self.kv_heads, BLOCK_TOKENS, self.dim)
        self.pool = torch.randn(shape).to(self.dtype)
        self.tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for row, ids in enumerate(order.split(blocks)):
            self.tables[row, : len(ids)] = ids
        self.lens = torch.tensor(self.contexts, dtype=torch.int32)
        self.params = AttentionParams(scale=self.dim**-0.5)

    def contiguous(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[S, kv heads, longest, D]`` of a layer, padded on the left as transformers pads."""
        longest = max(self.contexts)
        k, v = (torch.zeros(len(self.contexts), self.kv_heads, longest, self.dim, dtype=self.dtype) for _ in range(2))
        for row, tokens in enumerate(self.contexts):
            ids = self.tables[row, : -(-tokens // BLOCK_TOKENS)].long()
            both = self.pool[ids, layer].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :tokens]
            k[row, :, longest - tokens :], v[row, :, longest - tokens :] = both
        return k, v

    def mask(self) -> Tensor | None:
        """Which padded keys a row sees, or None where there is no padding."""
        longest = max(self.contexts)
        if min(self.contexts) == longest:
            return None
        places = torch.arange(longest)
        return (places >= (longest - self.lens)[:, None])[:, None, None, :]


def decode_rounds(ground: Ground) -> tuple[dict[str, Round], dict[str, float], float]:
    """One query of every sequence through all layers: contenders, their errors, bytes that must be read."""
    q = torch.randn(len(ground.contexts), ground.query_heads, ground.dim).to(ground.dtype)
    out, mask, group = torch.empty_like(q), ground.mask(), ground.query_heads // ground.kv_heads
    caches = [ground.contiguous(layer) for layer in range(ground.layers)]

    def paged() -> None:
        for layer in range(ground.layers):
            paged_decode(q, ground.pool, layer, ground.tables, ground.lens, ground.params, out=out)

    def grouped() -> Tensor:
        for k, v in caches:
            result = sdpa(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)
        return result[:, :, 0]

    def repeated() -> Tensor:
        for k, v in caches:
            wide = (each.repeat_interleave(group, dim=1) for each in (k, v))
            result = sdpa(q[:, :, None], *wide, attn_mask=mask)
        return result[:, :, 0]

    paged()
    k, v = (each.double() for each in caches[-1])
    exact = sdpa(q.double()[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]
    errors = {"spillway": error(out, exact), "SDPA": error(grouped(), exact)}
    rounds: dict[str, Round] = {"spillway": paged, "SDPA grouped": grouped, "SDPA repeated": repeated}
    return rounds, errors, ground.layer_bytes * ground.layers


def prefill_rounds(ground: Ground) -> tuple[dict[str, Round], dict[str, float], float]:
    """Whole prompts through all layers: contenders, their errors, FLOPs of the causal part."""
    total, longest = sum(ground.contexts), max(ground.contexts)
    starts = torch.tensor([0, *torch.tensor(ground.contexts).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(total, ground.query_heads, ground.dim).to(ground.dtype)
    out = torch.empty_like(q)
    padded = torch.zeros(len(ground.contexts), ground.query_heads, longest, ground.dim, dtype=ground.dtype)
    for row, chunk in enumerate(q.split(ground.contexts)):
        padded[row, :, longest - len(chunk) :] = chunk.transpose(0, 1)
    seen = ground.mask()
    mask = None if seen is None else torch.ones(longest, longest, dtype=torch.bool).tril() & seen
    caches = [ground.contiguous(layer) for layer in range(ground.layers)]

    def paged() -> None:
        for layer in range(ground.layers):
            flash_prefill(q, ground.pool, layer, ground.tables, starts, ground.lens, ground.params, out=out)

    def grouped() -> Tensor:
        for k, v in caches:
            result = sdpa(padded, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return result

    def rows(result: Tensor) -> Tensor:
        return torch.cat(
            [result[row, :, longest - tokens :].transpose(0, 1) for row, tokens in enumerate(ground.contexts)]
        )

    paged()
    k, v = (each.double() for each in caches[-1])
    exact = rows(sdpa(padded.double(), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True))
    errors = {"spillway": error(out, exact), "SDPA": error(rows(grouped()), exact)}
    pairs = sum(tokens * (tokens + 1) // 2 for tokens in ground.contexts)
    flops = 4.0 * pairs * ground.query_heads * ground.dim * ground.layers
    return {"spillway": paged, "SDPA grouped": grouped}, errors, flops


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def best_seconds(rounds: dict[str, Round], seconds: float) -> dict[str, float]:
    """Shortest round of each, all taking turns."""
    best = dict.fromkeys(rounds, float("inf"))
    for call in rounds.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in rounds.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def limits() -> dict[str, Round]:
    """What the hardware is asked beside the contenders, each a round of known bytes or FLOPs."""
    data = torch.ones(SWEEP_BYTES // 4)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return {"read": data.sum, "matmul": lambda: left @ right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ceilings, cells = limits(), []
    for case in cases(options.only):
        ground = Ground(case)
        rounds, errors, work = (decode_rounds if case.op == "decode" else prefill_rounds)(ground)
        with torch.inference_mode():
            taken = best_seconds(rounds | ceilings, options.seconds)
        peer = min(value for name, value in taken.items() if name.startswith("SDPA"))
        cell = asdict(case) | {"spillway": work / taken["spillway"], "sdpa": work / peer}
        cells.append(cell | {"seconds": taken, "errors": errors})
        print(f"{case}: {peer / taken['spillway']:.2f} times SDPA", file=sys.stderr, flush=True)
    kept = {
        "machine": machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "seed": 0,
        "command": ["python", "benchmarks/kernels/cpu_attention.py", *sys.argv[1:]],
        "read_bytes_per_s": SWEEP_BYTES / min(cell["seconds"]["read"] for cell in cells),
        "matmul_flop_per_s": 2 * 1024**3 / min(cell["seconds"]["matmul"] for cell in cells),
        "cells": cells,
    }
    (RESULTS / "kernels-cpu-attention.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(attention_table(kept))


def cases(ops: list[str]) -> list[Case]:
    """What is compared."""
    decode = [(64, 64, 128), (64, 512, 512), (16, 2048, 2048), (16, 512, 4096), (1, 16384, 16384)]
    prefill = [(32, 32, 512), (4, 1024, 1024), (1, 4096, 4096)]
    shapes = [("decode", each) for each in decode] + [("prefill", each) for each in prefill]
    return [
        Case(op, heads, dtype, *lengths) for op, lengths in shapes if op in ops for heads in HEADS for dtype in DTYPES
    ]


if __name__ == "__main__":
    main()
