"""The ops in Triton. CUDA tensors only, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1)."""

from spillway.kernels.ops.cascade import cascade_decode
from spillway.kernels.ops.copy_blocks import copy_blocks
from spillway.kernels.ops.flash_prefill import flash_prefill
from spillway.kernels.ops.gather_blocks import gather_blocks, scatter_blocks
from spillway.kernels.ops.merge_states import merge_states
from spillway.kernels.ops.paged_decode import paged_decode
from spillway.kernels.ops.quantize import dequantize, quantize
from spillway.kernels.ops.rms_norm import rms_norm
from spillway.kernels.ops.rope_write_kv import rope_write_kv
from spillway.kernels.ops.sample import SampleSettings, sample
from spillway.kernels.ops.score_sums import score_sums
from spillway.kernels.ops.silu_mul import silu_mul
from spillway.kernels.ops.write_kv import write_kv

__all__ = [
    "SampleSettings",
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
    "sample",
    "scatter_blocks",
    "score_sums",
    "silu_mul",
    "write_kv",
]
