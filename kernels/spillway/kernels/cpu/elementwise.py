"""Norms, activation and rotary on the CPU, in float32 rows; other dtypes and odd widths take the float64 definition."""

import ctypes
import struct

import torch
from torch import Tensor

from spillway.kernels.cpu import elementwise_layout as layout
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.cpu.formats import BFLOAT16, FLOAT16, FLOAT32, FORMAT_OF

_ARGUMENTS = ctypes.c_int64 * layout.COUNT
_WORK_A_THREAD = 16384  # numbers below which a second thread costs more than it brings


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _plain(*tensors: Tensor | None, width: int, lanes: int) -> bool:
    """Whether all rows are float32, contiguous within, and of whole vectors."""
    return width % lanes == 0 and all(
        each is None or (each.dtype == torch.float32 and each.stride(-1) == 1) for each in tensors
    )


def _run(name: str, arguments: "ctypes.Array[ctypes.c_int64]", rows: int, row_numbers: int) -> None:
    threads = max(1, min(torch.get_num_threads(), rows * row_numbers // _WORK_A_THREAD))
    arguments[layout.ROWS] = rows
    arguments[layout.ROWS_A_TASK] = max(1, min(16, rows // (4 * threads)))
    kernel(name).run(arguments, threads)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> bool:
    """See `spillway.kernels.rms_norm`; False where the rows are not of a kind that the compiled kernel takes."""
    rows, width = x.shape
    if not _plain(x, weight, residual, out, width=width, lanes=16):
        return False
    arguments = _ARGUMENTS()
    arguments[layout.WIDTH] = width
    arguments[layout.X], arguments[layout.X_STRIDE] = x.data_ptr(), x.stride(0) * 4
    if residual is not None:
        arguments[layout.SECOND], arguments[layout.SECOND_STRIDE] = residual.data_ptr(), residual.stride(0) * 4
    arguments[layout.OUT], arguments[layout.OUT_STRIDE] = out.data_ptr(), out.stride(0) * 4
    arguments[layout.WEIGHT] = weight.data_ptr()
    arguments[layout.INVERSE], arguments[layout.EPS] = _bits(1.0 / width), _bits(eps)
    _run("rms_norm", arguments, rows, width)
    return True


def silu_mul(gate_up: Tensor, out: Tensor) -> bool:
    """See `spillway.kernels.silu_mul`; False as in `rms_norm`."""
    rows, width = out.shape
    if not _plain(gate_up, out, width=width, lanes=16):
        return False
    arguments = _ARGUMENTS()
    arguments[layout.WIDTH] = width
    arguments[layout.X], arguments[layout.X_STRIDE] = gate_up.data_ptr(), gate_up.stride(0) * 4
    arguments[layout.OUT], arguments[layout.OUT_STRIDE] = out.data_ptr(), out.stride(0) * 4
    _run("silu_mul", arguments, rows, 4 * width)
    return True


def rope_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    pool: Tensor,
    layer: int,
    slots: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> bool:
    """See `spillway.kernels.rope_write_kv`; False as in `rms_norm`."""
    kv_heads, block_tokens, channels = pool.shape[3:]
    half = cos_sin.shape[1] // 2
    pool_format = FORMAT_OF.get(pool.dtype)
    plain = _plain(qkv, cos_sin, *norms, width=channels, lanes=8) and half % 8 == 0 and pool.is_contiguous()
    if not plain or pool_format not in (FLOAT32, BFLOAT16, FLOAT16):
        return False
    item = pool.element_size()
    layer_bytes = 2 * kv_heads * block_tokens * channels * item
    keys = pool.data_ptr() + layer * layer_bytes
    q_norm, k_norm = norms
    arguments = _ARGUMENTS()
    arguments[layout.WIDTH] = channels
    arguments[layout.X], arguments[layout.X_STRIDE] = qkv.data_ptr(), qkv.stride(0) * 4
    arguments[layout.INVERSE], arguments[layout.EPS] = _bits(1.0 / channels), _bits(eps)
    arguments[layout.COS_SIN], arguments[layout.COS_STRIDE] = cos_sin.data_ptr(), cos_sin.stride(0) * 4
    arguments[layout.POSITIONS], arguments[layout.SLOTS] = positions.data_ptr(), slots.data_ptr()
    arguments[layout.KEYS], arguments[layout.VALUES] = keys, keys + layer_bytes // 2
    arguments[layout.BLOCK_STRIDE] = pool.shape[1] * layer_bytes
    arguments[layout.HEAD_STRIDE] = block_tokens * channels * item
    arguments[layout.BLOCK_TOKENS], arguments[layout.KV_HEADS] = block_tokens, kv_heads
    arguments[layout.Q_HEADS] = qkv.shape[1] // channels - 2 * kv_heads
    arguments[layout.HALF], arguments[layout.POOL_FORMAT] = half, pool_format
    arguments[layout.Q_NORM] = 0 if q_norm is None else q_norm.data_ptr()
    arguments[layout.K_NORM] = 0 if k_norm is None else k_norm.data_ptr()
    _run("rope_write_kv", arguments, qkv.shape[0], qkv.shape[1])
    return True
