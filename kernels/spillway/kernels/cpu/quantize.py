"""KV blocks as codes and back, on the CPU."""

import ctypes
import struct

import torch
from torch import Tensor

from spillway.kernels.cpu.block_layout import CODE_ARGUMENTS, FP8_CODE, INT4_CODE, INT8_CODE
from spillway.kernels.cpu.checks import format_code
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.cpu.launch import scratch_address
from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.quantization import QuantFormat, group_channels, groups_per_layer, quantized_block_bytes

_PACK = struct.Struct(CODE_ARGUMENTS)
_Block = ctypes.c_int64 * len(CODE_ARGUMENTS)
_CODES = {QuantFormat.FP8: FP8_CODE, QuantFormat.INT8: INT8_CODE, QuantFormat.INT4: INT4_CODE}


def quantize(blocks: Tensor, quant_format: QuantFormat, *, out: Tensor | None = None) -> Tensor:
    """See `spillway.kernels.quantize`."""
    row_bytes = quantized_block_bytes(blocks.shape[1:], quant_format)
    if out is None:
        out = torch.empty((blocks.shape[0], row_bytes), dtype=torch.uint8)
    _run("quantize_blocks", blocks, out, quant_format)
    return out


def dequantize(packed: Tensor, quant_format: QuantFormat, out: Tensor) -> Tensor:
    """See `spillway.kernels.dequantize`."""
    _run("dequantize_blocks", out, packed, quant_format)
    return out


def _run(name: str, blocks: Tensor, packed: Tensor, quant_format: QuantFormat) -> None:
    row_bytes = quantized_block_bytes(blocks.shape[1:], quant_format)
    if packed.shape != (blocks.shape[0], row_bytes) or not (packed.is_contiguous() and blocks.is_contiguous()):
        raise KernelShapeError(
            f"blocks {tuple(blocks.shape)} are [{blocks.shape[0]}, {row_bytes}] in {quant_format}, both contiguous, "
            f"got {tuple(packed.shape)}"
        )
    if packed.dtype is not torch.uint8:
        raise KernelDtypeError(f"codes are uint8, got {packed.dtype}")
    count, layers, _, kv_heads, block_tokens, channels = blocks.shape
    values = layers * 2 * kv_heads * block_tokens * channels
    scales = values * quant_format.code_bits // 8
    minima = scales + layers * sum(groups_per_layer(kv_heads, block_tokens, channels)) * 2
    threads = min(torch.get_num_threads(), max(count * layers, 1))
    scratch_bytes = -(-(16 + block_tokens * (channels + 16) * 4) // 64) * 64
    arguments = _Block()
    _PACK.pack_into(
        arguments, 0, 0, 0, scratch_address(threads * scratch_bytes), scratch_bytes,
        count, layers, kv_heads, block_tokens, channels, group_channels(channels),
        blocks.data_ptr(), format_code("blocks", blocks.dtype, 3), packed.data_ptr(), row_bytes,
        _CODES[quant_format], quant_format.code_bits, scales,
        scales if quant_format is QuantFormat.FP8 else minima,
    )  # fmt: skip
    kernel(name).run(arguments, threads)
