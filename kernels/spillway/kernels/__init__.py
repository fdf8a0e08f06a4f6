"""Attention and KV kernels: Triton on CUDA, compiled twins on torch's own threads on CPU, fp64 references for tests."""

from spillway.kernels.decode_split import decode_scratch_bytes
from spillway.kernels.dispatch import (
    cascade_decode,
    copy_blocks,
    dequantize,
    flash_prefill,
    gather_blocks,
    merge_states,
    on_triton,
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
    "decode_scratch_bytes",
    "dequantize",
    "flash_prefill",
    "gather_blocks",
    "merge_states",
    "on_triton",
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
