"""The functions that Python calls by name."""

from spillway.kernels.cpu.jit.blocks import move_blocks
from spillway.kernels.cpu.jit.cascade import cascade_shared
from spillway.kernels.cpu.jit.decode import paged_decode
from spillway.kernels.cpu.jit.elementwise import rms_norm, silu_mul, write_kv
from spillway.kernels.cpu.jit.linear import linear
from spillway.kernels.cpu.jit.merge import merge_states
from spillway.kernels.cpu.jit.prefill import flash_prefill
from spillway.kernels.cpu.jit.quantize import dequantize_blocks, quantize_blocks
from spillway.kernels.cpu.jit.scores import score_sums

ENTRIES = [
    cascade_shared,
    dequantize_blocks,
    flash_prefill,
    linear,
    merge_states,
    move_blocks,
    paged_decode,
    quantize_blocks,
    rms_norm,
    score_sums,
    silu_mul,
    write_kv,
]
