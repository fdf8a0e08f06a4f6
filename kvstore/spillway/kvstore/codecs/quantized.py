"""Lossy codecs: fp8, int8 and int4 in groups. The byte layout and the arithmetic are those of the part ``kernels``.

    codes | float16 scales, one per group | float16 minima, one per group (not in fp8)

Keys are grouped per channel over the block's tokens, values per token over runs of at most 64 channels (KIVI, Liu et
al. 2024, section 3; group size of FlexGen, Sheng et al. 2023, section 4.2). Groups are numbered per layer, keys first.
"""

from __future__ import annotations

from math import prod

import numpy as np
import numpy.typing as npt

from ..buffers import Bytes
from ..errors import ConfigError
from .base import Codec

Floats = npt.NDArray[np.float32]

NUMBERS = {"fp8": 1, "int8": 2, "int4": 3}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_RUN_CHANNELS = 64
_FP8_MAX = 448.0
_HALF_MAX = 65504.0
_LEVELS = {"int8": 255.0, "int4": 15.0}


class QuantizedCodec(Codec):
    """Codes a block of ``shape`` ``[layers, 2, kv_heads, block_tokens, head_dim]`` and ``dtype`` as ``name`` says."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Raise `ConfigError` for a name, a dtype or a shape that cannot be coded."""
        if name not in NUMBERS:
            raise ConfigError(f"no codec {name!r}: choose one of none, {', '.join(NUMBERS)}")
        if dtype not in _ITEM_BYTES:
            raise ConfigError(f"{name} codes {', '.join(_ITEM_BYTES)}, not {dtype}")
        if len(shape) != 5 or shape[1] != 2 or shape[4] % 2 or min(shape) < 1:
            raise ConfigError(f"{name} takes [layers, 2, kv_heads, block_tokens, even head_dim], not {list(shape)}")
        self.number = NUMBERS[name]
        self._name = name
        self._shape = shape
        self._dtype = dtype
        layers, _, heads, tokens, channels = shape
        self._run = max(n for n in range(1, min(channels, _RUN_CHANNELS) + 1) if channels % n == 0)
        self._key_groups = heads * channels
        self._groups = layers * (self._key_groups + heads * tokens * (channels // self._run))
        self._code_bytes = prod(shape) * (4 if name == "int4" else 8) // 8

    def stored_bytes(self, raw_bytes: int) -> int:
        """See `Codec.stored_bytes`."""
        expected = prod(self._shape) * _ITEM_BYTES[self._dtype]
        if raw_bytes != expected:
            raise ConfigError(
                f"a block of shape {list(self._shape)} in {self._dtype} has {expected} bytes, not {raw_bytes}"
            )
        return self._code_bytes + self._groups * 2 * (1 if self._name == "fp8" else 2)

    def encode(self, raw: Bytes, out: Bytes) -> None:
        """See `Codec.encode`. Values beyond the range of float16 saturate."""
        values = _to_floats(raw, self._dtype).reshape(self._shape)
        keys, runs = values[:, 0], self._in_runs(values[:, 1])
        key_codes, key_scales, key_lows = _code(keys, self._name, -2)
        run_codes, run_scales, run_lows = _code(runs, self._name, -1)
        codes: Bytes = np.stack((key_codes, run_codes.reshape(key_codes.shape)), axis=1)
        if self._name == "int4":
            codes = np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], np.uint8(4)))
        out[: self._code_bytes] = codes.reshape(-1)
        fields = [self._join(key_scales, run_scales)]
        if self._name != "fp8":
            fields.append(self._join(key_lows, run_lows))
        out[self._code_bytes :] = np.concatenate(fields).view(np.uint8)

    def decode(self, coded: Bytes, out: Bytes) -> None:
        """See `Codec.decode`."""
        codes = coded[: self._code_bytes]
        if self._name == "int4":
            codes = np.stack((codes & 15, codes >> 4), axis=-1)
        codes = codes.reshape(self._shape)
        numbers = _FP8_VALUES[codes] if self._name == "fp8" else codes.astype(np.float32)
        fields = coded[self._code_bytes :].view(np.float16).astype(np.float32).reshape(-1, self._groups)
        values = np.empty(self._shape, np.float32)
        key_scales, run_scales = self._split(fields[0])
        np.multiply(numbers[:, 0], key_scales, out=values[:, 0])
        runs = self._in_runs(numbers[:, 1]) * run_scales
        if self._name != "fp8":
            key_lows, run_lows = self._split(fields[1])
            values[:, 0] += key_lows
            runs += run_lows
        values[:, 1] = runs.reshape(values[:, 1].shape)
        _from_floats(values, self._dtype, out)

    def _in_runs(self, values: Floats) -> Floats:
        return values.reshape(*values.shape[:-1], -1, self._run)

    def _join(self, keys: Floats, runs: Floats) -> npt.NDArray[np.float16]:
        layers = self._shape[0]
        return (
            np.concatenate((keys.reshape(layers, -1), runs.reshape(layers, -1)), axis=1).astype(np.float16).reshape(-1)
        )

    def _split(self, field: Floats) -> tuple[Floats, Floats]:
        layers, _, heads, tokens, channels = self._shape
        by_layer = field.reshape(layers, -1)
        keys = by_layer[:, : self._key_groups].reshape(layers, heads, 1, channels)
        runs = by_layer[:, self._key_groups :].reshape(layers, heads, tokens, channels // self._run, 1)
        return keys, runs


def _code(x: Floats, name: str, axis: int) -> tuple[Bytes, Floats, Floats]:
    """Codes, and the scale and minimum of each group along ``axis``."""
    if name == "fp8":
        scale = _half(np.abs(x).max(axis, keepdims=True) / np.float32(_FP8_MAX) * np.float32(1 + 2**-10) + 2**-24)
        return _fp8_codes(x / scale), scale, scale
    levels = np.float32(_LEVELS[name])
    low = x.min(axis, keepdims=True)
    low = _half(low - (np.abs(low) * np.float32(2**-10) + np.float32(2**-24)))
    scale = _half((x.max(axis, keepdims=True) - low) / levels * np.float32(1 + 2**-10) + np.float32(2**-24))
    return np.clip(np.floor((x - low) / scale + np.float32(0.5)), 0, levels).astype(np.uint8), scale, low


def _half(x: Floats) -> Floats:
    return np.clip(x, -_HALF_MAX, _HALF_MAX).astype(np.float16).astype(np.float32)


def _fp8_codes(x: Floats) -> Bytes:
    """e4m3 codes of float32 values, rounded to nearest even, saturating at 448."""
    clipped = np.clip(x, -_FP8_MAX, _FP8_MAX)
    bits = clipped.view(np.uint32)
    sign = (bits >> 24 & 0x80).astype(np.uint8)
    bits = np.bitwise_and(bits, np.uint32(0x7FFFFFFF))
    rounded = bits + 0x7FFFF + (bits >> 20 & 1)
    normal = ((rounded >> 20) - (120 << 3)).astype(np.uint8)
    subnormal = np.rint(np.abs(clipped) * np.float32(512)).astype(np.uint8)
    return np.where(bits < 121 << 23, subnormal, normal) | sign


def _fp8_values() -> Floats:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10))
    size[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -size, size).astype(np.float32)


_FP8_VALUES = _fp8_values()


def _to_floats(raw: Bytes, dtype: str) -> Floats:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


def _from_floats(values: Floats, dtype: str, out: Bytes) -> None:
    flat = values.reshape(-1)
    if dtype != "bfloat16":
        out.view(dtype)[:] = flat
        return
    bits = flat.view(np.uint32)
    out.view(np.uint16)[:] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
