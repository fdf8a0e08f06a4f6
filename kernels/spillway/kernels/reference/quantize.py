"""The block codes, from their definition in `spillway.kernels.quantization`."""

import torch
from torch import Tensor

from spillway.kernels.quantization import QuantFormat, group_channels


def quantize_values(blocks: Tensor, quant_format: QuantFormat) -> Tensor:
    """What `dequantize(quantize(blocks))` means: the coded values as float64, same shape as blocks."""
    x = blocks.float()
    out = torch.empty_like(x)
    out[:, :, 0] = _code(x[:, :, 0], quant_format, dim=-2)
    run = group_channels(blocks.shape[-1])
    out[:, :, 1] = _code(x[:, :, 1].reshape(*x[:, :, 1].shape[:-1], -1, run), quant_format, dim=-1).flatten(-2)
    return out.double()


def _code(x: Tensor, quant_format: QuantFormat, dim: int) -> Tensor:
    if quant_format is QuantFormat.FP8:
        scale = _half(x.abs().amax(dim, keepdim=True) / 448 * (1 + 2**-10) + 2**-24)
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    levels = 15 if quant_format is QuantFormat.INT4 else 255
    low = x.amin(dim, keepdim=True)
    low = _half(low - (low.abs() * 2**-10 + 2**-24))
    scale = _half((x.amax(dim, keepdim=True) - low) / levels * (1 + 2**-10) + 2**-24)
    return low + torch.floor((x - low) / scale + 0.5).clamp(0, levels) * scale


def _half(x: Tensor) -> Tensor:
    return x.clamp(-65504, 65504).half().float()
