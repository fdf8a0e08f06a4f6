"""Norm and activation on the CPU."""

import torch
from torch import Tensor

from spillway.kernels.cpu.checks import check_rows, format_code, row_stride
from spillway.kernels.cpu.elementwise_layout import NORM_ARGUMENTS, SILU_ARGUMENTS
from spillway.kernels.cpu.rows import run_rows
from spillway.kernels.errors import KernelShapeError


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `spillway.kernels.rms_norm`."""
    if x.dim() != 2:
        raise KernelShapeError(f"x must be [rows, width], got {tuple(x.shape)}")
    rows, width = x.shape
    if weight.shape != x.shape[1:] or weight.dtype is not x.dtype or not weight.is_contiguous():
        raise KernelShapeError(f"weight must be {x.dtype} [{width}], got {weight.dtype} {tuple(weight.shape)}")
    if out is None:
        out = torch.empty_like(x)
    run_rows(
        "rms_norm", NORM_ARGUMENTS, rows, width,
        format_code("x", x.dtype, 3), width,
        x.data_ptr(), row_stride("x", x, width),
        out.data_ptr(), check_rows("out", out, x.shape, x.dtype, width),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else check_rows("residual", residual, x.shape, x.dtype, width),
        weight.data_ptr(), eps,
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `spillway.kernels.silu_mul`."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise KernelShapeError(f"gate_up must be [rows, 2 width], got {tuple(gate_up.shape)}")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty((rows, width), dtype=gate_up.dtype)
    run_rows(
        "silu_mul", SILU_ARGUMENTS, rows, 4 * width,
        format_code("gate_up", gate_up.dtype, 3), width,
        gate_up.data_ptr(), row_stride("gate_up", gate_up, 2 * width),
        out.data_ptr(), check_rows("out", out, torch.Size((rows, width)), gate_up.dtype, width),
    )  # fmt: skip
    return out
