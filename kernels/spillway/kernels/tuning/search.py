"""Which tiles are worth timing: all combinations, less those that spill or do not fit once they are compiled."""

import itertools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from spillway.kernels import ops
from spillway.kernels.params import AttentionParams
from spillway.kernels.tuning.ahead import compiling, resources_of
from spillway.kernels.tuning.gpu import Gpu
from spillway.kernels.tuning.tables import DecodeTile, PrefillTile, Tile, trying


@dataclass(frozen=True, slots=True)
class Workload:
    """What a tile is tuned on: one op over sequences of equal length, 32 query and 8 kv heads.

    Attributes:
        op: prefill or decode.
        head_dim, pool_bits: the variant; operands have 16 bits (bfloat16).
        biased: with a soft cap.
        sequences, tokens: size of the batch. Prefill runs whole prompts.
    """

    op: str
    head_dim: int
    pool_bits: int
    biased: bool
    sequences: int
    tokens: int

    def call(self, device: str, *, run: bool = True) -> Callable[[], object]:
        """The op's call on random data; what is only compiled gets a pool and queries of almost nothing."""
        per_sequence = -(-self.tokens // 16)
        held = per_sequence * self.sequences if run else 8
        dtype = torch.bfloat16 if self.pool_bits == 16 else torch.int8
        shape = (held, 1, 2, 8, 16, self.head_dim)
        if dtype is torch.int8:
            pool = torch.randint(-100, 100, shape, dtype=dtype, device=device)
        else:
            pool = torch.randn(shape, dtype=dtype, device=device)
        scales = torch.full((2, 8), 0.01, device=device) if dtype is torch.int8 else None
        cap = 30.0 if self.biased else None
        params = AttentionParams(scale=self.head_dim**-0.5, kv_scales=scales, soft_cap=cap)
        ids = torch.randperm(per_sequence * self.sequences, device=device) % held
        tables = ids.int().view(self.sequences, per_sequence)
        lens = torch.full((self.sequences,), self.tokens, dtype=torch.int32, device=device)
        rows = self.sequences * (self.tokens if self.op == "prefill" and run else 1)
        q = torch.randn(rows, 32, self.head_dim, dtype=torch.bfloat16, device=device)
        out = torch.empty_like(q)
        if self.op == "decode":
            return lambda: ops.paged_decode(q, pool, 0, tables, lens, params, out=out)
        starts = torch.arange(self.sequences + 1, dtype=torch.int32, device=device) * self.tokens
        return lambda: ops.flash_prefill(q, pool, 0, tables, starts, lens, params, out=out)


def candidates(op: str) -> list[Tile]:
    """Every tile of the search."""
    if op == "prefill":
        return [
            PrefillTile(rows, keys, warps, depth)
            for rows, keys, warps, depth in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        ]
    return [
        DecodeTile(keys, warps, depth, programs)
        for keys, warps, depth, programs in itertools.product((32, 64, 128), (2, 4, 8), (1, 2, 3, 4), (2, 3, 4))
    ]


def compiles(gpu: Gpu, workload: Workload, tile: Tile) -> bool:
    """Whether the tile's kernel neither spills nor wants too much; leaves it in Triton's cache."""
    call = workload.call("cpu", run=False)
    with trying(tile), compiling(gpu) as kernels:
        call()
    return resources_of(kernels[0]).problem(gpu) is None


def worth_timing(gpu: Gpu, workload: Workload) -> list[Tile]:
    """The candidates that compile well, found in as many processes as there are cores."""
    tiles = candidates(workload.op)
    # Programs per multiprocessor change the grid, not the code.
    kernels = {_code_of(tile): tile for tile in tiles}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        fine = list(pool.map(compiles, *zip(*((gpu, workload, tile) for tile in kernels.values()), strict=True)))
    good = {code for code, ok in zip(kernels, fine, strict=True) if ok}
    return [tile for tile in tiles if _code_of(tile) in good]


def _code_of(tile: Tile) -> tuple[object, ...]:
    if isinstance(tile, PrefillTile):
        return tile.rows, tile.keys, tile.warps, tile.depth
    return tile.keys, tile.warps, tile.depth
