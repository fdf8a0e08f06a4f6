"""Two attention results over disjoint keys become one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.tiles import narrow
from spillway.kernels.tuning.gpu import INTERPRETED, power_of_two

_ROWS = 8  # (row, head) pairs of one program


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `spillway.kernels.merge_states`."""
    out = torch.empty_like(out_a) if out is None else out
    lse = torch.empty_like(lse_a) if lse is None else lse
    for tensor in (out_a, out_b, out):
        if tensor.dim() != 3 or tensor.shape != out_a.shape or not tensor.is_contiguous():
            raise KernelShapeError(f"outputs must be contiguous {tuple(out_a.shape)}, got {tuple(tensor.shape)}")
    for tensor in (lse_a, lse_b, lse):
        if tensor.shape != out_a.shape[:2] or not tensor.is_contiguous():
            raise KernelShapeError(f"log-sum-exps must be {tuple(out_a.shape[:2])}, got {tuple(tensor.shape)}")
        if tensor.dtype is not torch.float32:
            raise KernelDtypeError(f"a log-sum-exp is float32, got {tensor.dtype}")
    rows, dim = lse.numel(), out_a.shape[2]
    launch(
        _merge_states_kernel,
        (-(-rows // _ROWS), 1, 1),
        out_a,
        out,
        lse,
        out_a,
        lse_a,
        out_b,
        lse_b,
        rows,
        dim=dim,
        padded_dim=power_of_two(dim),
        block=_ROWS,
        interpreted=INTERPRETED,
        num_warps=4,
    )
    return out, lse


@triton.jit(do_not_specialize=["rows"])
def _merge_states_kernel(
    out,  # [rows, dim]
    lse,  # [rows] f32, natural
    out_a,  # [rows, dim]
    lse_a,  # [rows] f32
    out_b,  # [rows, dim]
    lse_b,  # [rows] f32
    rows,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block: tl.constexpr,
    interpreted: tl.constexpr,
):
    """``sum_i e^(lse_i - top) out_i / sum_i e^(lse_i - top)``; with both at -inf, zeros and -inf."""
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    ok = row < rows
    a = tl.load(lse_a + row, mask=ok, other=float("-inf"))
    b = tl.load(lse_b + row, mask=ok, other=float("-inf"))
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(a - top)
    weight_b = tl.exp(b - top)
    total = weight_a + weight_b
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    tl.store(lse + row, tl.where(seen, top + tl.log(safe), float("-inf")), mask=ok)

    d = tl.arange(0, padded_dim)
    inside = ok[:, None] & (d < dim)[None, :]
    at = row[:, None] * dim + d[None, :]
    # A side that saw nothing may hold anything, even NaN: its weight is 0 and its values are not taken.
    x = tl.load(out_a + at, mask=inside & (weight_a > 0.0)[:, None], other=0.0).to(tl.float32)
    y = tl.load(out_b + at, mask=inside & (weight_b > 0.0)[:, None], other=0.0).to(tl.float32)
    merged = x * (weight_a / safe)[:, None] + y * (weight_b / safe)[:, None]
    tl.store(out + at, narrow(merged, out.dtype.element_ty, interpreted), mask=inside)
