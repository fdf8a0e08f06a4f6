"""The byte layout of a quantized KV block, shared by every implementation.

A block ``[layers, 2, kv_heads, block_tokens, head_dim]`` becomes three byte ranges, in this order::

    codes    one per value in the block's own order; int4 packs two neighbours along head_dim, the even one low
    scales   float16, one per group
    minima   float16, one per group (absent in fp8)

Keys are grouped per channel over the tokens of the block, values per token over runs of channels (KIVI, section 3:
keys have a few outlier channels, values have none). A run is the longest even divisor of head_dim up to 64, the group
size of FlexGen (section 4.2). Groups are numbered in the block's order: per layer all key heads' channels, then all
value heads' tokens and runs.

A group's minimum is rounded down and its scale up, so that no value is clipped::

    low   = f16(min - (|min| * 2^-10 + 2^-24))
    scale = f16((max - low) / levels * (1 + 2^-10) + 2^-24)        levels = 15 (int4), 255 (int8)
    code  = clamp(floor((x - low) / scale + 0.5), 0, levels);      value = low + code * scale

and in fp8 (e4m3, symmetric) ``scale = f16(max|x| / 448 * (1 + 2^-10) + 2^-24)``, ``code = e4m3(x / scale)``,
``value = code * scale``. All arithmetic is in float32; values beyond the range of float16 saturate.
"""

from collections.abc import Sequence
from enum import StrEnum

from spillway.kernels.errors import KernelShapeError

GROUP_CHANNELS = 64


class QuantFormat(StrEnum):
    """How a stored block's values are coded."""

    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def code_bits(self) -> int:
        """Bits per value."""
        return 4 if self is QuantFormat.INT4 else 8

    @property
    def group_fields(self) -> int:
        """Float16 numbers kept per group: scale, and the minimum where there is one."""
        return 1 if self is QuantFormat.FP8 else 2


def group_channels(head_dim: int) -> int:
    """Channels of one value group: the longest even divisor of head_dim that is at most 64; head_dim is even."""
    return max(n for n in range(2, min(head_dim, GROUP_CHANNELS) + 1, 2) if head_dim % n == 0)


def groups_per_layer(kv_heads: int, block_tokens: int, head_dim: int) -> tuple[int, int]:
    """Key groups and value groups of one layer of a block."""
    return kv_heads * head_dim, kv_heads * block_tokens * (head_dim // group_channels(head_dim))


def quantized_block_bytes(block_shape: Sequence[int], quant_format: QuantFormat) -> int:
    """Bytes of one quantized block of ``[layers, 2, kv_heads, block_tokens, head_dim]``.

    Raises:
        KernelShapeError: not such a shape, or an odd head_dim with int4.
    """
    if len(block_shape) != 5 or block_shape[1] != 2:
        raise KernelShapeError(f"a block is [layers, 2, kv_heads, block_tokens, head_dim], got {tuple(block_shape)}")
    layers, _, kv_heads, block_tokens, head_dim = block_shape
    if head_dim % 2:
        raise KernelShapeError(f"head_dim must be even to be quantized, got {head_dim}")
    values = layers * 2 * kv_heads * block_tokens * head_dim
    groups = layers * sum(groups_per_layer(kv_heads, block_tokens, head_dim))
    return values * quant_format.code_bits // 8 + groups * 2 * quant_format.group_fields
