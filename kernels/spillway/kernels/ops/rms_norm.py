"""RMSNorm, with the residual sum in the same pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.tiles import narrow
from spillway.kernels.tuning.gpu import INTERPRETED, power_of_two


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `spillway.kernels.rms_norm`."""
    out = torch.empty_like(x) if out is None else out
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise KernelShapeError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    for tensor in (x, out) if residual is None else (x, out, residual):
        if tensor.shape != x.shape or tensor.stride(1) != 1:
            raise KernelShapeError(f"expected rows of {tuple(x.shape)}, got {tuple(tensor.shape)} {tensor.stride()}")
        if tensor.dtype is not x.dtype:
            raise KernelDtypeError(f"x is {x.dtype} but another tensor {tensor.dtype}")
    width = x.shape[1]
    block = power_of_two(width)
    launch(
        _rms_norm_kernel,
        (x.shape[0], 1, 1),
        x,
        out,
        x,
        weight,
        residual if residual is not None else x,
        eps,
        x.stride(0),
        out.stride(0),
        residual.stride(0) if residual is not None else 0,
        width=width,
        block=block,
        add=residual is not None,
        interpreted=INTERPRETED,
        num_warps=min(16, max(1, block // 512)),
    )
    return out


@triton.jit
def _rms_norm_kernel(
    out,  # [T, width]
    x,  # [T, width]
    weight,  # [width]
    residual,  # [T, width], if add
    eps,
    x_stride,
    out_stride,
    residual_stride,
    width: tl.constexpr,
    block: tl.constexpr,
    add: tl.constexpr,
    interpreted: tl.constexpr,
):
    """One row: ``weight * (h / sqrt(mean(h^2) + eps))``, in float32 throughout, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    ok = i < width
    dtype: tl.constexpr = x.dtype.element_ty
    h = tl.load(x + row * x_stride + i, mask=ok, other=0.0).to(tl.float32)
    if add:
        # The sum is what the next layers add to, so it is rounded first and then normalized as rounded.
        h += tl.load(residual + row * residual_stride + i, mask=ok, other=0.0).to(tl.float32)
        rounded = narrow(h, dtype, interpreted)
        tl.store(residual + row * residual_stride + i, rounded, mask=ok)
        h = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    y = h * scale * tl.load(weight + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + i, narrow(y, dtype, interpreted), mask=ok)
