"""The element-wise ops and the KV write."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Normalized rows, and the sum with the residual, rounded to its dtype as the op leaves it."""
    added = None if residual is None else (residual.double() + x.double()).to(residual.dtype)
    h = x.double() if added is None else added.double()
    return weight.double() * h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps), added


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def rotate(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first R channels of ``[T, heads, head_dim]``; cos_sin is ``[T, R]``."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin.double()[:, None, :half], cos_sin.double()[:, None, half:]
    heads = heads.double()
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rope_qkv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_heads: int,
    head_dim: int,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Finished q ``[T, query heads, head_dim]``, k and v ``[T, kv_heads, head_dim]`` of a fused projection."""
    heads = qkv.double().reshape(qkv.shape[0], -1, head_dim)
    q, k, v = heads[:, : -2 * kv_heads], heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
    q_norm, k_norm = norms
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)[0]
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)[0]
    table = cos_sin[positions]
    return rotate(q, table), rotate(k, table), v


def write_kv(k: Tensor, v: Tensor, pool: Tensor, layer: int, slots: Tensor, kv_scales: Tensor | None = None) -> Tensor:
    """A float64 copy of the pool with the tokens in their slots, before any rounding to the pool's dtype."""
    pool = pool.double()
    block_tokens = pool.shape[4]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            pair = torch.stack([k[token], v[token]]).double()  # [2, kv_heads, head_dim]
            if kv_scales is not None:
                pair = pair / kv_scales.double()[:, :, None]
            pool[slot // block_tokens, layer, :, :, slot % block_tokens] = pair
    return pool
