"""Dense layers with their weights in the form the device multiplies fastest.

On CPU that is a oneDNN-packed weight. Measured in float32: two to five times `F.linear` at 8 to 64 rows on AMD cores,
and each row's result is bit for bit the same however many rows share the call, which `F.linear` does not promise below
8 rows. Without bfloat16 instructions a bfloat16 matrix product runs at an eighth of the float32 rate, so there the
weights are rounded to the asked dtype and computed with in float32, at twice the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Linear(Protocol):
    """``[T, in]`` → ``[T, out]``, a new tensor."""

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply, and add the bias where there is one."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """An ordinary weight ``[out, in]``: cuBLAS on CUDA."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``x · weightᵀ + bias``."""
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A weight in oneDNN's own blocked order; the ordinary one can be freed."""

    packed: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``x · weightᵀ + bias``; `x` is contiguous."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def make_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A linear from ``weight [out, in]``. On CPU the weight is copied into packed form and may be reused afterwards."""
    if weight.device.type != "cpu":
        return DenseLinear(weight, bias)
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and activations where `dtype` was asked for: float32 on a CPU that is slow in it."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    native = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return dtype if native else torch.float32
