"""How one attention layer looks at its keys."""

import math
from dataclasses import dataclass

import torch

from spillway.kernels.errors import KernelValueError


@dataclass(frozen=True, slots=True, eq=False)
class AttentionParams:
    """Settings of one attention layer; build it once per layer, the ops cache what they derive from it.

    The score of a query at position p with a key at position j is, in this order::

        s = scale * (q . k)
        s = soft_cap * tanh(s / soft_cap)        where soft_cap is set
        s = s + alibi_slopes[head] * (j - p)     where slopes are set

    Key j is visible when ``j <= p`` (if causal) and, where a window is set, ``j > p - window or j < sinks``.

    Attributes:
        scale: factor on the dot product, usually ``head_dim ** -0.5``.
        window: how many keys up to and including its own a query sees; None means all.
        sinks: the first tokens that stay visible beside the window (StreamingLLM, section 3.2); 0 means none.
        soft_cap: bound on the scores (Gemma 2); None means none.
        alibi_slopes: ``[query heads]`` float32 slopes (Press et al. 2022, section 3); None means none.
        causal: False lets every query see the whole context.
        kv_scales: ``[2, kv_heads]`` float32 for a pool of fp8 or int8: what is stored times its head's scale is the
            value (row 0 for K, row 1 for V); None means 1.

    Raises:
        KernelValueError: a setting outside its range.
    """

    scale: float
    window: int | None = None
    sinks: int = 0
    soft_cap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    causal: bool = True
    kv_scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise KernelValueError(f"scale must be a positive number, got {self.scale}")
        if self.window is not None and self.window < 1:
            raise KernelValueError(f"window must be at least 1 token, got {self.window}")
        if self.sinks < 0:
            raise KernelValueError(f"sinks cannot be negative, got {self.sinks}")
        if self.soft_cap is not None and not (math.isfinite(self.soft_cap) and self.soft_cap > 0):
            raise KernelValueError(f"soft_cap must be a positive number, got {self.soft_cap}")
        slopes = self.alibi_slopes
        if slopes is not None and (slopes.dim() != 1 or slopes.dtype != torch.float32):
            raise KernelValueError(f"alibi_slopes must be float32 [heads], got {slopes.dtype} {tuple(slopes.shape)}")
        scales = self.kv_scales
        if scales is not None and (scales.dim() != 2 or scales.shape[0] != 2 or scales.dtype != torch.float32):
            raise KernelValueError(f"kv_scales must be float32 [2, heads], got {scales.dtype} {tuple(scales.shape)}")
