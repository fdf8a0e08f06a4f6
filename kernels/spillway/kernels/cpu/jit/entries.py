"""The functions that Python calls by name."""

from spillway.kernels.cpu.jit.cascade import cascade_shared
from spillway.kernels.cpu.jit.decode import paged_decode
from spillway.kernels.cpu.jit.elementwise import rms_norm, silu_mul, write_kv
from spillway.kernels.cpu.jit.linear import linear
from spillway.kernels.cpu.jit.prefill import flash_prefill

ENTRIES = [flash_prefill, paged_decode, cascade_shared, rms_norm, silu_mul, write_kv, linear]
