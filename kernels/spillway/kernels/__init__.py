"""Attention and KV kernels: Triton on CUDA, Numba twins on CPU, fp64 references for the tests.

Importing this module fixes two settings that only count before torch and Numba start their threads: without them two
thread pools spin on the same cores, and attention that takes 3 s takes 40.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # an idle OpenMP thread sleeps instead of spinning
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")  # never a second OpenMP runtime beside torch's

from spillway.kernels.dispatch import (
    cascade_decode,
    copy_blocks,
    dequantize,
    flash_prefill,
    gather_blocks,
    merge_states,
    paged_decode,
    quantize,
    rms_norm,
    rope_write_kv,
    scatter_blocks,
    score_sums,
    silu_mul,
    write_kv,
)
from spillway.kernels.errors import (
    BackendError,
    KernelDtypeError,
    KernelError,
    KernelShapeError,
    KernelValueError,
)
from spillway.kernels.params import AttentionParams
from spillway.kernels.quantization import QuantFormat, quantized_block_bytes

__all__ = [
    "AttentionParams",
    "BackendError",
    "KernelDtypeError",
    "KernelError",
    "KernelShapeError",
    "KernelValueError",
    "QuantFormat",
    "cascade_decode",
    "copy_blocks",
    "dequantize",
    "flash_prefill",
    "gather_blocks",
    "merge_states",
    "paged_decode",
    "quantize",
    "quantized_block_bytes",
    "rms_norm",
    "rope_write_kv",
    "scatter_blocks",
    "score_sums",
    "silu_mul",
    "write_kv",
]
