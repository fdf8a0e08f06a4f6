#!/usr/bin/env python3
"""The ops that only move memory, on a GPU: bytes that must move over the copy bandwidth of the same run.

PYTHONPATH=kernels python benchmarks/kernels/rows_gpu.py [--out FILE]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_ground import RESULTS, Record, Report, copies_past_l2, start, timed
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from spillway.kernels import ops
from spillway.kernels.quantization import QuantFormat, quantized_block_bytes

BF16 = torch.bfloat16
Call = Callable[[], object]


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "rows-gpu.json")
    options = parser.parse_args()
    report = start()
    run(report)
    report.write(options.out)


def run(report: Report) -> None:
    """All sections."""
    for rows in (256, 8192):
        norms(report, rows)
        gates(report, rows)
        rotary(report, rows)
    blocks(report)
    sampling(report)


def bandwidth(report: Report, section: str, case: str, name: str, calls: list[Call], moved: int) -> None:
    """Time calls that each must move so many bytes."""
    record = Record(section, case, name, None)
    timed(report, record, calls, lambda ms: moved / ms / 1e6, report.ceilings.copy_gb_s)


def several(rows: int, width: int, moved: int) -> list[Tensor]:
    """Random rows, as many sets as it takes to get past the L2 cache."""
    return [torch.randn(rows, width, dtype=BF16, device="cuda") for _ in range(copies_past_l2(moved))]


def norms(report: Report, rows: int, width: int = 4096) -> None:
    """RMSNorm with residual: reads two tensors, writes two."""
    moved = 4 * rows * width * 2
    weight = torch.randn(width, dtype=BF16, device="cuda")
    inputs = several(rows, width, moved)
    residuals, outs = [x.clone() for x in inputs], [torch.empty_like(x) for x in inputs]
    case = f"{rows} x {width}"
    calls: list[Call] = [
        (lambda x=x, r=r, o=o: ops.rms_norm(x, weight, 1e-6, residual=r, out=o))
        for x, r, o in zip(inputs, residuals, outs, strict=True)
    ]
    bandwidth(report, "rms_norm", case, "spillway, residual fused", calls, moved)

    def eager(x: Tensor, r: Tensor) -> Tensor:
        r += x
        return rms_norm(r, (width,), weight, 1e-6)

    calls = [(lambda x=x, r=r: eager(x, r)) for x, r in zip(inputs, residuals, strict=True)]
    bandwidth(report, "rms_norm", case, "torch, add then rms_norm", calls, moved)


def gates(report: Report, rows: int, width: int = 14336) -> None:
    """silu(gate) * up: reads two, writes one."""
    moved = 3 * rows * width * 2
    inputs = several(rows, 2 * width, moved)
    outs = [torch.empty(rows, width, dtype=BF16, device="cuda") for _ in inputs]
    case = f"{rows} x {width}"
    calls: list[Call] = [(lambda x=x, o=o: ops.silu_mul(x, out=o)) for x, o in zip(inputs, outs, strict=True)]
    bandwidth(report, "silu_mul", case, "spillway", calls, moved)
    calls = [(lambda x=x: silu(x[:, :width]) * x[:, width:]) for x in inputs]
    bandwidth(report, "silu_mul", case, "torch, two kernels", calls, moved)


def rotary(report: Report, rows: int) -> None:
    """Rotary and KV write, 32/8 heads of 128: reads q, k and v once, writes them once."""
    width = (32 + 16) * 128
    moved = 2 * rows * width * 2
    inputs = several(rows, width, moved)
    pool = torch.zeros(rows // 16 * len(inputs), 1, 2, 8, 16, 128, dtype=BF16, device="cuda")
    table = torch.randn(8192, 128, device="cuda")
    positions = torch.randint(0, 8192, (rows,), device="cuda")
    slots = torch.randperm(rows * len(inputs), device="cuda").view(len(inputs), rows)
    calls: list[Call] = [
        (lambda x=x, s=s: ops.rope_write_kv(x, table, positions, pool, 0, s))
        for x, s in zip(inputs, slots.unbind(), strict=True)
    ]
    bandwidth(report, "rope", f"{rows} x 32/8 heads, d128", "spillway, rotary and KV write", calls, moved)


def blocks(report: Report) -> None:
    """Blocks of 2 MiB (Llama 3.1 8B): moved, coded and decoded."""
    count, shape = 512, (32, 2, 8, 16, 128)
    pool = torch.randn(2 * count, *shape, dtype=BF16, device="cuda")
    staging = torch.empty(count, *shape, dtype=BF16, device="cuda")
    ids = torch.randperm(2 * count, device="cuda")
    half, other = ids[:count].contiguous(), ids[count:].contiguous()
    size = staging.numel() * 2
    case = f"{count} blocks of 2 MiB"
    bandwidth(report, "blocks", case, "gather", [lambda: ops.gather_blocks(pool, half, staging)], 2 * size)
    bandwidth(report, "blocks", case, "gather, torch index", [lambda: torch.index_select(pool, 0, half)], 2 * size)
    bandwidth(report, "blocks", case, "scatter", [lambda: ops.scatter_blocks(pool, half, staging)], 2 * size)
    bandwidth(report, "blocks", case, "copy within the pool", [lambda: ops.copy_blocks(pool, half, other)], 2 * size)
    for quant_format in QuantFormat:
        packed = torch.empty(count, quantized_block_bytes(shape, quant_format), dtype=torch.uint8, device="cuda")
        moved = size + packed.numel()
        both: list[Call] = [
            lambda f=quant_format, p=packed: ops.quantize(staging, f, out=p),
            lambda f=quant_format, p=packed: ops.dequantize(p, f, staging),
        ]
        bandwidth(report, "blocks", case, f"quantize {quant_format}", both[:1], moved)
        bandwidth(report, "blocks", case, f"dequantize {quant_format}", both[1:], moved)


def sampling(report: Report, vocabulary: int = 128256) -> None:
    """Top-k and top-p; the floor reads the logits once."""
    for rows in (32, 256):
        logits = torch.randn(rows, vocabulary, device="cuda") * 3
        case, moved = f"{rows} x {vocabulary}", logits.numel() * 4
        for top_k in (0, 50):
            bandwidth(report, "sample", case, f"spillway, p 0.9, k {top_k}", [drawing(logits, top_k)], moved)
        uniform = torch.rand(rows, 1, device="cuda")
        bandwidth(report, "sample", case, "torch, sort", [lambda x=logits, u=uniform: sorted_draw(x, u)], moved)


def drawing(logits: Tensor, top_k: int) -> Call:
    """Ours with temperature 0.9 and top-p 0.9."""
    each = torch.full(logits.shape[:1], 0.9, device="cuda")
    settings = ops.SampleSettings(each, torch.full_like(each, top_k).int(), each, 0 * each, torch.rand_like(each))
    return lambda: ops.sample(logits, settings)


def sorted_draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Nucleus sampling the usual way."""
    values, ids = logits.sort(dim=-1, descending=True)
    mass = (values / 0.9).softmax(-1).cumsum(-1)
    return ids.gather(1, torch.searchsorted(mass, 0.9 * uniform))


if __name__ == "__main__":
    main()
