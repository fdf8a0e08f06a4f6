"""Calls that stand for the variants in use: what the resource table lists and the compile check covers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spillway.kernels import ops
from spillway.kernels.params import AttentionParams
from spillway.kernels.quantization import QuantFormat, quantized_block_bytes

BF16, FP16, FP32, FP8, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8

_SEQUENCES, _BLOCKS, _LAYERS, _TABLE = 64, 8, 2, 512


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads, channels, block and dtypes of an attention call."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_tokens: int = 16
    dtype: torch.dtype = BF16
    pool_dtype: torch.dtype | None = None

    def pool(self) -> torch.Tensor:
        """A small pool."""
        shape = (_BLOCKS, _LAYERS, 2, self.kv_heads, self.block_tokens, self.head_dim)
        return torch.zeros(shape, dtype=self.pool_dtype or self.dtype)

    def queries(self, rows: int) -> torch.Tensor:
        """Queries of so many tokens."""
        return torch.zeros(rows, self.query_heads, self.head_dim, dtype=self.dtype)

    def params(self, features: str) -> AttentionParams:
        """Settings with the features named: any of window, bias."""
        quantized = self.pool_dtype in (FP8, INT8)
        return AttentionParams(
            scale=self.head_dim**-0.5,
            window=4096 if "window" in features else None,
            sinks=4 if "window" in features else 0,
            soft_cap=30.0 if "bias" in features else None,
            alibi_slopes=torch.ones(self.query_heads) if "bias" in features else None,
            kv_scales=torch.ones(2, self.kv_heads) if quantized else None,
        )


def _tables(sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(sequences, _TABLE, dtype=torch.int32), torch.zeros(sequences, dtype=torch.int32)


def _prefill(shape: Shape, features: str = "", rows: int = 4096) -> None:
    tables, lens = _tables(4)
    starts = torch.zeros(5, dtype=torch.int32)
    lse = torch.zeros(rows, shape.query_heads)
    ops.flash_prefill(shape.queries(rows), shape.pool(), 1, tables, starts, lens, shape.params(features), lse=lse)


def _decode(shape: Shape, features: str = "") -> None:
    tables, lens = _tables(_SEQUENCES)
    lse = torch.zeros(_SEQUENCES, shape.query_heads)
    ops.paged_decode(shape.queries(_SEQUENCES), shape.pool(), 1, tables, lens, shape.params(features), lse=lse)


def _cascade(shape: Shape, features: str = "") -> None:
    tables, lens = _tables(_SEQUENCES)
    ops.cascade_decode(shape.queries(_SEQUENCES), shape.pool(), 1, tables, lens, 2048, shape.params(features))


def _score_sums(shape: Shape) -> None:
    tables, lens = _tables(4)
    q = shape.queries(4)
    sums = torch.zeros(4, shape.kv_heads, 1024)
    starts = torch.zeros(5, dtype=torch.int32)
    lse = torch.zeros(q.shape[:2])
    ops.score_sums(q, shape.pool(), 1, tables, starts, lens, lse, shape.params(""), sums)


def _merge_states() -> None:
    out, lse = torch.zeros(64, 32, 128, dtype=BF16), torch.zeros(64, 32)
    ops.merge_states(out, lse, out, lse)


def _write_kv(shape: Shape) -> None:
    k = torch.zeros(64, shape.kv_heads, shape.head_dim, dtype=shape.dtype)
    scales = shape.params("").kv_scales
    ops.write_kv(k, k, shape.pool(), 1, torch.zeros(64, dtype=torch.int64), kv_scales=scales)


def _rope(shape: Shape, rotated: int, norms: bool) -> None:
    heads = shape.query_heads + 2 * shape.kv_heads
    norm = torch.ones(shape.head_dim, dtype=shape.dtype) if norms else None
    at = torch.zeros(64, dtype=torch.int64)
    qkv = torch.zeros(64, heads * shape.head_dim, dtype=shape.dtype)
    scales = shape.params("").kv_scales
    table = torch.zeros(4096, rotated)
    ops.rope_write_kv(qkv, table, at, shape.pool(), 1, at, q_norm=norm, k_norm=norm, kv_scales=scales)


def _rms_norm(width: int) -> None:
    x = torch.zeros(64, width, dtype=BF16)
    ops.rms_norm(x, torch.ones(width, dtype=BF16), 1e-6, residual=x.clone())


def _copy_blocks() -> None:
    ids = torch.zeros(4, dtype=torch.int64)
    ops.copy_blocks(Shape().pool(), ids, ids)


def _sample() -> None:
    each = torch.ones(64)
    ops.sample(torch.zeros(64, 128256), ops.SampleSettings(each, each.int(), each, each, each))


def _quantize(quant_format: QuantFormat, undo: bool) -> None:
    blocks = Shape().pool()
    packed = torch.zeros(_BLOCKS, quantized_block_bytes(blocks.shape[1:], quant_format), dtype=torch.uint8)
    if undo:
        ops.dequantize(packed, quant_format, blocks)
    else:
        ops.quantize(blocks, quant_format, out=packed)


def _call(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)


# fp8 needs capability 8.9: these are left out for older targets.
FP8_CASES = ("prefill d128 fp8 KV", "decode d128 fp8 KV", "write_kv fp8", "quantize fp8", "dequantize fp8")

CASES: dict[str, Callable[[], None]] = {
    "prefill d64": _call(_prefill, Shape(8, 8, 64)),
    "prefill d80": _call(_prefill, Shape(32, 32, 80)),
    "prefill d96 fp16": _call(_prefill, Shape(32, 32, 96, dtype=FP16)),
    "prefill d128": _call(_prefill, Shape()),
    "prefill d128 blocks of 64": _call(_prefill, Shape(block_tokens=64)),
    "prefill d128 window, sinks": _call(_prefill, Shape(), "window"),
    "prefill d128 ALiBi, soft cap": _call(_prefill, Shape(), "bias"),
    "prefill d128 fp8 KV": _call(_prefill, Shape(pool_dtype=FP8)),
    "prefill d128 int8 KV": _call(_prefill, Shape(pool_dtype=INT8)),
    "prefill d128 few rows": _call(_prefill, Shape(), "", 16),
    "prefill d256": _call(_prefill, Shape(16, 8, 256)),
    "prefill d128 fp32": _call(_prefill, Shape(dtype=FP32)),
    "decode d64, 7 heads a group": _call(_decode, Shape(14, 2, 64)),
    "decode d80": _call(_decode, Shape(32, 32, 80)),
    "decode d128": _call(_decode, Shape()),
    "decode d128 window, sinks": _call(_decode, Shape(), "window"),
    "decode d128 ALiBi, soft cap": _call(_decode, Shape(), "bias"),
    "decode d128 fp8 KV": _call(_decode, Shape(pool_dtype=FP8)),
    "decode d128 int8 KV": _call(_decode, Shape(pool_dtype=INT8)),
    "decode d256": _call(_decode, Shape(16, 8, 256)),
    "decode d128 fp32": _call(_decode, Shape(dtype=FP32)),
    "cascade d128": _call(_cascade, Shape()),
    "score_sums d128": _call(_score_sums, Shape()),
    "merge_states": _merge_states,
    "write_kv bf16": _call(_write_kv, Shape()),
    "write_kv fp8": _call(_write_kv, Shape(pool_dtype=FP8)),
    "write_kv int8": _call(_write_kv, Shape(pool_dtype=INT8)),
    "rope_write_kv, norms": _call(_rope, Shape(), 128, True),
    "rope_write_kv, partly rotated": _call(_rope, Shape(head_dim=80), 32, False),
    "rms_norm 4096": _call(_rms_norm, 4096),
    "rms_norm 8192": _call(_rms_norm, 8192),
    "silu_mul": lambda: (ops.silu_mul(torch.zeros(64, 2 * 14336, dtype=BF16)), None)[1],
    "copy_blocks": _copy_blocks,
    "sample": _sample,
    "quantize fp8": _call(_quantize, QuantFormat.FP8, False),
    "quantize int4": _call(_quantize, QuantFormat.INT4, False),
    "dequantize fp8": _call(_quantize, QuantFormat.FP8, True),
    "dequantize int4": _call(_quantize, QuantFormat.INT4, True),
}
