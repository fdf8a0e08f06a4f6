"""The ops in Triton. CUDA tensors only, or CPU tensors under Triton's interpreter (TRITON_INTERPRET=1)."""

from spillway.kernels.ops.flash_prefill import flash_prefill
from spillway.kernels.ops.paged_decode import paged_decode

__all__ = ["flash_prefill", "paged_decode"]
