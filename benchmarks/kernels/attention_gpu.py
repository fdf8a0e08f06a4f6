#!/usr/bin/env python3
"""Attention on a GPU beside its peers, against the ceilings of the same run.

    PYTHONPATH=kernels python benchmarks/kernels/attention_gpu.py [--only prefill decode paged cascade] [--out FILE]

Prefill is counted in TFLOP/s of the causal half (2 * tokens^2 * query heads * head_dim a sequence), decode in GB/s of
the keys and values that must be read. Every op's result is checked against float64 before it is timed. Data is random;
small problems rotate through several sets of data, so that none is read from the L2 cache.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_ground import RESULTS, Record, Report, copies_past_l2, start, timed
from gpu_peers import BACKENDS, flashinfer_decode, flashinfer_prefill, flex, freed, sdpa
from torch import Tensor

from spillway.kernels import ops
from spillway.kernels.params import AttentionParams

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
Call = Callable[[], object]


def run(report: Report, only: tuple[str, ...] = ()) -> None:
    """The sections asked for; all where none is."""
    for name in only or SECTIONS:
        SECTIONS[name](report)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[])
    parser.add_argument("--out", type=Path, default=RESULTS / "attention-gpu.json")
    options = parser.parse_args()
    report = start()
    run(report, tuple(options.only))
    report.write(options.out)


def params_of(head_dim: int, pool: Tensor) -> AttentionParams:
    """Plain settings; what an 8-bit pool stores is taken as it is, scaled to about 1."""
    scales = None
    if pool.element_size() == 1:
        scales = torch.full((2, pool.shape[3]), 1 / 40 if pool.dtype is torch.int8 else 1.0, device="cuda")
    return AttentionParams(scale=head_dim**-0.5, kv_scales=scales)


def new_pool(blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype = BF16, block_tokens: int = 16) -> Tensor:
    """One layer of random keys and values."""
    pool = torch.empty(blocks, 1, 2, kv_heads, block_tokens, head_dim, dtype=BF16, device="cuda").normal_()
    if dtype is torch.int8:
        return (pool * 40).clamp(-128, 127).to(dtype)
    return pool.to(dtype)


def ints(values: object) -> Tensor:
    """int32 on the device."""
    return torch.as_tensor(values, dtype=torch.int32, device="cuda")


def error_of(out: Tensor, q: Tensor, pool: Tensor, table: Tensor, tokens: int, params: AttentionParams) -> float:
    """Relative error of one sequence's last rows ``[rows, heads, D]`` against float64 on the device."""
    rows, heads = q.shape[:2]
    kv = pool[table.long(), 0].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :tokens]
    if params.kv_scales is not None:
        kv = kv * params.kv_scales.double()[:, :, None, None]
    k, v = kv.repeat_interleave(heads // kv.shape[1], dim=1)
    scores = torch.einsum("qhd,hkd->hqk", q.double(), k) * params.scale
    hidden = torch.ones(rows, tokens, dtype=torch.bool, device="cuda").triu(tokens - rows + 1)
    wanted = torch.einsum("hqk,hkd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return ((out.double() - wanted).norm() / wanted.norm()).item()


def prefill(report: Report) -> None:
    """Whole prompts, 16k tokens in all."""
    for query_heads, kv_heads, dim in ((16, 16, 128), (32, 8, 128), (32, 32, 64), (8, 8, 256)):
        for tokens in (1024, 2048, 4096, 8192, 16384):
            with freed():
                _prefill_case(report, 16384 // tokens, tokens, (query_heads, kv_heads, dim))


def _prefill_case(report: Report, batch: int, tokens: int, shape: tuple[int, int, int]) -> None:
    query_heads, kv_heads, dim = shape
    case = f"{batch} x {tokens}, {query_heads}/{kv_heads} heads, d{dim}"
    operations = 2.0 * batch * tokens**2 * query_heads * dim
    ceiling = report.ceilings.matmul_tflop_s

    def rate(ms: float) -> float:
        return operations / ms / 1e9

    per_sequence = tokens // 16
    pool = new_pool(batch * per_sequence, kv_heads, dim)
    tables = torch.randperm(batch * per_sequence, device="cuda").int().view(batch, per_sequence)
    lens, starts = ints([tokens] * batch), ints([tokens * i for i in range(batch + 1)])
    q = torch.randn(batch * tokens, query_heads, dim, dtype=BF16, device="cuda")
    out, params = torch.full_like(q, torch.nan), params_of(dim, pool)

    def ours() -> Tensor:
        return ops.flash_prefill(q, pool, 0, tables, starts, lens, params, out=out)

    ours()
    last = slice(tokens - 16, tokens)
    error = error_of(out[last], q[last], pool, tables[0], tokens, params)
    timed(report, Record("prefill", case, "spillway, blocks of 16", None, error=error), [ours], rate, ceiling)
    shaped = q.view(batch, tokens, query_heads, dim).transpose(1, 2).contiguous()
    k, v = torch.randn(2, batch, kv_heads, tokens, dim, dtype=BF16, device="cuda")
    for name, backend in BACKENDS.items():
        timed(report, Record("prefill", case, name, None), [sdpa(backend, shaped, k, v, True)], rate, ceiling)
    if tokens >= 8192 and dim == 128:  # compiling takes a while for each shape
        timed(report, Record("prefill", case, "FlexAttention", None), [flex(shaped, k, v, True)], rate, ceiling)
    other = flashinfer_prefill(shaped, k, v)
    if other is not None:
        timed(report, Record("prefill", case, "FlashInfer", None), [other], rate, ceiling)


DECODES = [(1, 4096), (1, 16384), (1, 65536), (8, 4096), (8, 65536), (64, 4096), (64, 16384), (256, 4096), (256, 16384)]


def decode(report: Report) -> None:
    """One query per sequence, 32 query heads on 8 kv heads of 128 channels."""
    for batch, tokens in DECODES:
        with freed():
            _decode_case(report, batch, tokens)
        with freed():
            _decode_peers(report, batch, tokens)


def _decode_calls(batch: int, tokens: int, pool: Tensor, tables: Tensor, q: Tensor) -> list[Call]:
    """One call for each set of tables ``[sets, batch, blocks]``."""
    lens, params, out = ints([tokens] * batch), params_of(q.shape[2], pool), torch.empty_like(q)
    return [
        (lambda table=table: ops.paged_decode(q, pool, 0, table, lens, params, out=out)) for table in tables.unbind()
    ]


def _decode_case(report: Report, batch: int, tokens: int) -> None:
    case = f"{batch} x {tokens}, 32/8 heads, d128"
    for name, dtype in (("spillway, bf16", BF16), ("spillway, fp8", FP8), ("spillway, int8", torch.int8)):
        with freed():
            kv_bytes = batch * tokens * 2 * 8 * 128 * dtype.itemsize
            sets, per_sequence = copies_past_l2(kv_bytes), tokens // 16
            pool = new_pool(sets * batch * per_sequence, 8, 128, dtype)
            tables = torch.randperm(pool.shape[0], device="cuda").int().view(sets, batch, per_sequence)
            q = torch.randn(batch, 32, 128, dtype=BF16, device="cuda")
            params = params_of(128, pool)
            out = ops.paged_decode(q, pool, 0, tables[0], ints([tokens] * batch), params)
            error = error_of(out[-1:], q[-1:], pool, tables[0, -1], tokens, params)
            moved = kv_bytes + 2 * q.numel() * q.element_size()
            record = Record("decode", case, name, None, error=error)
            calls = _decode_calls(batch, tokens, pool, tables, q)
            timed(report, record, calls, lambda ms, moved=moved: moved / ms / 1e6, report.ceilings.copy_gb_s)
            if dtype is BF16:
                other = flashinfer_decode(q, pool, tables[0], tokens)
                if other is not None:
                    record = Record("decode", case, "FlashInfer", None)
                    timed(report, record, [other], lambda ms, moved=moved: moved / ms / 1e6, report.ceilings.copy_gb_s)


def _decode_peers(report: Report, batch: int, tokens: int) -> None:
    """Peers read contiguous keys, with the heads of a group as query rows: none reads a key twice."""
    case = f"{batch} x {tokens}, 32/8 heads, d128"
    moved = batch * tokens * 2 * 8 * 128 * 2
    sets = copies_past_l2(moved)
    kv = torch.empty(sets, 2, batch, 8, tokens, 128, dtype=BF16, device="cuda").normal_()
    q = torch.randn(batch, 8, 4, 128, dtype=BF16, device="cuda")
    for name, backend in BACKENDS.items():
        calls = [sdpa(backend, q, k, v, False) for k, v in kv.unbind()]
        record = Record("decode", case, f"{name}, heads as rows", None)
        timed(report, record, calls, lambda ms: moved / ms / 1e6, report.ceilings.copy_gb_s)
    if (batch, tokens) in ((64, 4096), (8, 65536)):
        calls = [flex(q.view(batch, 32, 1, 128), k, v, False) for k, v in kv[:1].unbind()]
        record = Record("decode", case, "FlexAttention", None)
        timed(report, record, calls, lambda ms: moved / ms / 1e6, report.ceilings.copy_gb_s)


def paged(report: Report) -> None:
    """What pages cost: shuffled blocks of 16, 32, 64 beside the same tokens lying end to end."""
    for block_tokens in (16, 32, 64):
        for order in ("shuffled", "in order"):
            with freed():
                _paged_case(report, block_tokens, order)


def _paged_case(report: Report, block_tokens: int, order: str) -> None:
    batch, tokens = 64, 8192
    blocks = batch * tokens // block_tokens
    pool = new_pool(blocks, 8, 128, block_tokens=block_tokens)
    ids = torch.randperm(blocks, device="cuda") if order == "shuffled" else torch.arange(blocks, device="cuda")
    tables = ids.int().view(1, batch, -1)
    q = torch.randn(batch, 32, 128, dtype=BF16, device="cuda")
    moved = pool.numel() * 2
    name = f"blocks of {block_tokens}, {order}"
    record = Record("paged", f"decode {batch} x {tokens}, 32/8, d128", name, None)
    calls = _decode_calls(batch, tokens, pool, tables, q)
    timed(report, record, calls, lambda ms: moved / ms / 1e6, report.ceilings.copy_gb_s)
    rows = torch.randn(2 * tokens, 32, 128, dtype=BF16, device="cuda")
    out, params = torch.empty_like(rows), params_of(128, pool)
    lens, starts = ints([tokens] * 2), ints([0, tokens, 2 * tokens])

    def call() -> Tensor:
        return ops.flash_prefill(rows, pool, 0, tables[0, :2], starts, lens, params, out=out)

    record = Record("paged", f"prefill 2 x {tokens}, 32/8, d128", name, None)
    operations = 2.0 * 2 * tokens**2 * 32 * 128
    timed(report, record, [call], lambda ms: operations / ms / 1e9, report.ceilings.matmul_tflop_s)


def cascade(report: Report) -> None:
    """A prefix that a whole batch shares, then 256 tokens of each one's own. The rate is of the bytes read once."""
    for batch, shared in ((128, 32768), (128, 4096), (32, 32768), (256, 8192)):
        with freed():
            _cascade_case(report, batch, shared)


def _cascade_case(report: Report, batch: int, shared: int) -> None:
    own = 256
    prefix_blocks, own_blocks = shared // 16, own // 16
    pool = new_pool(prefix_blocks + batch * own_blocks, 8, 128)
    ids = torch.randperm(pool.shape[0], device="cuda").int()
    prefix = ids[:prefix_blocks].expand(batch, -1)
    tables = torch.cat([prefix, ids[prefix_blocks:].view(batch, own_blocks)], 1).contiguous()
    lens = ints([shared + own] * batch)
    q = torch.randn(batch, 32, 128, dtype=BF16, device="cuda")
    params, out = params_of(128, pool), torch.empty_like(q)
    case = f"{batch} x ({shared} shared + {own}), 32/8, d128"
    moved = pool.numel() * 2
    for name, call in (
        ("spillway cascade", lambda: ops.cascade_decode(q, pool, 0, tables, lens, shared, params, out=out)),
        ("spillway plain decode", lambda: ops.paged_decode(q, pool, 0, tables, lens, params, out=out)),
    ):
        out.fill_(torch.nan)
        call()
        error = error_of(out[-1:], q[-1:], pool, tables[-1], shared + own, params)
        record = Record("cascade", case, name, None, error=error)
        timed(report, record, [call], lambda ms: moved / ms / 1e6, report.ceilings.copy_gb_s)


SECTIONS = {"prefill": prefill, "decode": decode, "paged": paged, "cascade": cascade}

if __name__ == "__main__":
    main()
