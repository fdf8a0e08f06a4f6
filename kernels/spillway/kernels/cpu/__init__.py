"""The ops on CPU tensors: kernels spelled out in explicit vectors and compiled by LLVM when first needed."""

from spillway.kernels.cpu.blocks import copy_blocks, gather_blocks, scatter_blocks
from spillway.kernels.cpu.elementwise import rms_norm, silu_mul
from spillway.kernels.cpu.flash_prefill import flash_prefill
from spillway.kernels.cpu.merge_states import merge_states
from spillway.kernels.cpu.paged_decode import cascade_decode, paged_decode
from spillway.kernels.cpu.quantize import dequantize, quantize
from spillway.kernels.cpu.score_sums import score_sums
from spillway.kernels.cpu.write_kv import rope_write_kv, write_kv

__all__ = [
    "cascade_decode",
    "copy_blocks",
    "dequantize",
    "flash_prefill",
    "gather_blocks",
    "merge_states",
    "paged_decode",
    "quantize",
    "rms_norm",
    "rope_write_kv",
    "scatter_blocks",
    "score_sums",
    "silu_mul",
    "write_kv",
]
