"""Checks that the CPU ops share; each raises the kernels' typed errors."""

import torch
from torch import Tensor

from spillway.kernels.cpu.formats import FORMAT_OF
from spillway.kernels.errors import KernelDtypeError, KernelShapeError


def check_pool_shape(shape: torch.Size) -> tuple[int, ...]:
    """The six sizes of a pool."""
    if len(shape) != 6 or shape[2] != 2 or 0 in shape[1:]:
        raise KernelShapeError(f"a pool is [blocks, layers, 2, kv_heads, block_tokens, head_dim], got {tuple(shape)}")
    return tuple(shape)


def check_layer(layer: int, layers: int) -> None:
    """A layer of the pool."""
    if not 0 <= layer < layers:
        raise KernelShapeError(f"layer {layer} of a pool of {layers} layers")


def format_code(name: str, dtype: torch.dtype, formats: int) -> int:
    """The kernels' code of a dtype, among the first ``formats`` of them."""
    code = FORMAT_OF.get(dtype, formats)
    if code >= formats:
        known = ", ".join(str(known) for known in list(FORMAT_OF)[:formats])
        raise KernelDtypeError(f"{name} must be one of {known}, got {dtype}")
    return code


def row_stride(name: str, tensor: Tensor, row: int) -> int:
    """Bytes from one row ``tensor[i]`` of ``row`` contiguous numbers to the next."""
    if tensor.is_contiguous():
        return row * tensor.element_size()
    if len(tensor) and not tensor[0].is_contiguous():
        raise KernelShapeError(f"the rows of {name} must be contiguous, got strides {tensor.stride()}")
    return tensor.stride(0) * tensor.element_size()


def check_ids(name: str, ids: Tensor, count: int) -> int:
    """Address of int64 ``[count]``."""
    if ids.dtype is not torch.int64:
        raise KernelDtypeError(f"{name} must be int64, got {ids.dtype}")
    if ids.shape != (count,) or not ids.is_contiguous():
        raise KernelShapeError(f"{name} must be [{count}] and contiguous, got {tuple(ids.shape)}")
    return ids.data_ptr()


def check_rows(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, row: int) -> int:
    """Bytes between the rows of a tensor that must have this shape and dtype; a row is ``row`` contiguous numbers."""
    if tensor.shape != shape:
        raise KernelShapeError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype is not dtype:
        raise KernelDtypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    return row_stride(name, tensor, row)
