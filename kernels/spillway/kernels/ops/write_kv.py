"""Keys and values of new tokens into their slots of the pool, quantized on the way where the pool is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch
from spillway.kernels.ops.layout import check_pool
from spillway.kernels.ops.tiles import encode
from spillway.kernels.tuning.gpu import INTERPRETED, gpu_of, power_of_two


def write_kv(k: Tensor, v: Tensor, pool: Tensor, layer: int, slots: Tensor, *, kv_scales: Tensor | None = None) -> None:
    """See `spillway.kernels.write_kv`."""
    check_pool(pool)
    check_slots(slots, k.shape[0])
    kv_heads, block_tokens, head_dim = pool.shape[3:]
    for tensor in (k, v):
        inner = tensor.dim() == 3 and tensor.stride(2) == 1 and (kv_heads == 1 or tensor.stride(1) == head_dim)
        if not inner or tensor.shape != (slots.shape[0], kv_heads, head_dim):
            raise KernelShapeError(
                f"k and v must be {(slots.shape[0], kv_heads, head_dim)} with heads contiguous, "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    if k.dtype is not v.dtype:
        raise KernelDtypeError(f"k is {k.dtype} but v is {v.dtype}")
    check_scales(pool, kv_scales)
    launch(
        _write_kv_kernel,
        (slots.shape[0], 2, 1),
        k,
        k,
        v,
        pool,
        slots,
        kv_scales if kv_scales is not None else k,
        layer,
        k.stride(0),
        v.stride(0),
        pool.stride(0),
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        padded_heads=power_of_two(kv_heads),
        padded_dim=power_of_two(head_dim),
        scaled=kv_scales is not None,
        interpreted=INTERPRETED,
        num_warps=4,
    )


def check_slots(slots: Tensor, tokens: int) -> None:
    """Slots are contiguous int64, one per token."""
    if slots.shape != (tokens,) or not slots.is_contiguous():
        raise KernelShapeError(f"slots must be contiguous [{tokens}], got {tuple(slots.shape)}")
    if slots.dtype is not torch.int64:
        raise KernelDtypeError(f"slots are int64, got {slots.dtype}")


def check_scales(pool: Tensor, kv_scales: Tensor | None) -> None:
    """Scales fit the pool's heads, and the GPU can write what the pool stores."""
    if pool.dtype is torch.float8_e4m3fn and gpu_of(pool.device).capability < (8, 9):
        raise KernelDtypeError("fp8 pools need compute capability 8.9 or later; use int8 here")
    if kv_scales is not None and kv_scales.shape != (2, pool.shape[3]):
        raise KernelShapeError(f"kv_scales must be {(2, pool.shape[3])}, got {tuple(kv_scales.shape)}")
    if kv_scales is not None and kv_scales.dtype is not torch.float32:
        raise KernelDtypeError(f"kv_scales are float32, got {kv_scales.dtype}")


@triton.jit(do_not_specialize=["layer"])
def _write_kv_kernel(
    k,  # [T, kv_heads, head_dim]
    v,  # [T, kv_heads, head_dim]
    pool,  # [blocks, layers, 2, kv_heads, block_tokens, head_dim]
    slots,  # [T] i64
    kv_scales,  # [2, kv_heads] f32, if scaled
    layer,
    k_stride,  # elements from token to token
    v_stride,
    block_stride,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    padded_heads: tl.constexpr,
    padded_dim: tl.constexpr,
    scaled: tl.constexpr,
    interpreted: tl.constexpr,
):
    """One program: all heads of one token's keys (axis 1 at 0) or values (1)."""
    token = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = tl.arange(0, padded_heads)
    d = tl.arange(0, padded_dim)
    ok = (head < kv_heads)[:, None] & (d < head_dim)[None, :]
    inner = head[:, None] * head_dim + d[None, :]
    if side == 0:
        x = tl.load(k + token * k_stride + inner, mask=ok, other=0.0)
    else:
        x = tl.load(v + token * v_stride + inner, mask=ok, other=0.0)
    x = x.to(tl.float32)
    if scaled:
        x = x / tl.load(kv_scales + side * kv_heads + head, mask=head < kv_heads, other=1.0)[:, None]
    at = slot // block_tokens * block_stride + (layer.to(tl.int64) * 2 + side) * (kv_heads * block_tokens * head_dim)
    at = at + (slot % block_tokens) * head_dim
    rows = head[:, None] * (block_tokens * head_dim) + d[None, :]
    tl.store(pool + at + rows, encode(x, pool.dtype.element_ty, interpreted), mask=ok)
