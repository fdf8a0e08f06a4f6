"""The gated activation of a fused gate-up projection."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.tiles import narrow
from spillway.kernels.tuning.gpu import INTERPRETED

_BLOCK = 1024


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `spillway.kernels.silu_mul`."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise KernelShapeError(f"gate_up must be rows of [T, 2 I], got {tuple(gate_up.shape)} {gate_up.stride()}")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.shape != (rows, width) or out.stride(1) != 1:
        raise KernelShapeError(f"out must be rows of {(rows, width)}, got {tuple(out.shape)} {out.stride()}")
    if out.dtype is not gate_up.dtype:
        raise KernelDtypeError(f"gate_up is {gate_up.dtype} but out is {out.dtype}")
    launch(
        _silu_mul_kernel,
        (rows, -(-width // _BLOCK), 1),
        gate_up,
        out,
        gate_up,
        gate_up.stride(0),
        out.stride(0),
        width=width,
        block=_BLOCK,
        interpreted=INTERPRETED,
        num_warps=4,
    )
    return out


@triton.jit
def _silu_mul_kernel(
    out,  # [T, width]
    gate_up,  # [T, 2 * width], gate first
    in_stride,
    out_stride,
    width: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """``gate * sigmoid(gate) * up``."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    ok = i < width
    gate = tl.load(gate_up + row * in_stride + i, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + i, mask=ok, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_stride + i, narrow(y, out.dtype.element_ty, interpreted), mask=ok)
