"""Dense layers with their weights in the form the device multiplies fastest.

On CPU a weight is packed: for Spillway's own kernel where the CPU has AVX2 and no AVX-512, else for oneDNN. Both give
each row the same bits however many rows share the call, which `F.linear` does not promise below 8 rows. The choice
depends on the CPU alone, so that runs on one machine agree. Without bfloat16 instructions a bfloat16 product runs at an
eighth of the float32 rate, so there weights are rounded to the asked dtype and computed with in float32; our own kernel
reads bfloat16 weights as they are, oneDNN needs them as float32, at twice the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from spillway.kernels import silu_mul
from spillway.kernels.cpu.linear import PackedLinear


class Linear(Protocol):
    """``[T, in]`` → ``[T, out]``: into ``out`` where the form can write there, else a new tensor."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply, and add the bias where there is one."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """An ordinary weight ``[out, in]``: cuBLAS on CUDA."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x · weightᵀ + bias``."""
        if out is None:
            return functional.linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


@dataclass(frozen=True, slots=True, eq=False)
class OneDnnLinear:
    """A weight in oneDNN's own blocked order; the ordinary one can be freed."""

    packed: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: ARG002 - oneDNN allocates
        """``x · weightᵀ + bias``; `x` is contiguous."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@dataclass(frozen=True, slots=True, eq=False)
class GatedLinear:
    """``silu(gate) · up`` of a linear whose outputs are all gates, then all that they gate."""

    gate_up: Linear

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply, then activate."""
        return silu_mul(self.gate_up(x), out=out)


def make_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gated: bool = False) -> Linear:
    """A linear from ``weight [out, in]``, whose values are of ``dtype`` whatever they are held in.

    With ``gated`` the first half of the outputs are gates: the result is ``silu(first) · second``. On CPU the weight is
    copied into packed form and may be reused afterwards.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and _own_kernel_is_faster():
        return PackedLinear.pack(weight.to(torch.bfloat16) if dtype == torch.bfloat16 else weight, bias, gated=gated)
    linear: Linear = DenseLinear(weight, bias)
    if weight.device.type == "cpu":
        linear = OneDnnLinear(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias)
    return GatedLinear(linear) if gated else linear


def _own_kernel_is_faster() -> bool:
    """Measured on Zen 3: see benchmarks/kernels/cpu_linear.py. oneDNN's AVX-512 kernels were not beaten or tried."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and activations where `dtype` was asked for: float32 on a CPU that is slow in it."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    native = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return dtype if native else torch.float32
