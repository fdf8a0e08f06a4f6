"""Whole blocks between the pool and contiguous staging, at the speed of memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.ops.launch import launch

_WORDS = 2048  # 16 bytes for each of 256 threads, twice


def gather_blocks(pool: Tensor, ids: Tensor, staging: Tensor) -> None:
    """See `spillway.kernels.gather_blocks`."""
    _check(pool, ids, staging)
    move_blocks(staging, None, pool, ids)


def scatter_blocks(pool: Tensor, ids: Tensor, staging: Tensor) -> None:
    """See `spillway.kernels.scatter_blocks`."""
    _check(pool, ids, staging)
    move_blocks(pool, ids, staging, None)


def _check(pool: Tensor, ids: Tensor, staging: Tensor) -> None:
    if staging.dtype is not pool.dtype:
        raise KernelDtypeError(f"the pool is {pool.dtype} but staging is {staging.dtype}")
    if staging.shape[0] != ids.shape[0] or staging.numel() != ids.shape[0] * pool[:1].numel():
        raise KernelShapeError(f"staging {tuple(staging.shape)} is not {ids.shape[0]} blocks of {tuple(pool.shape)}")


def move_blocks(to: Tensor, to_ids: Tensor | None, source: Tensor, source_ids: Tensor | None) -> None:
    """Copy blocks from row to row of two contiguous tensors; ids of None count 0, 1, 2, ...

    Raises:
        KernelShapeError: a tensor is not contiguous, ids are not ``[n]``, or a block is not whole 4-byte words.
        KernelDtypeError: ids are not int64.
    """
    ids = to_ids if to_ids is not None else source_ids
    for tensor in (to_ids, source_ids):
        if tensor is not None and (tensor.dim() != 1 or not tensor.is_contiguous()):
            raise KernelShapeError(f"block ids must be contiguous [n], got {tuple(tensor.shape)}")
        if tensor is not None and tensor.dtype is not torch.int64:
            raise KernelDtypeError(f"block ids are int64, got {tensor.dtype}")
    if ids is None or not (to.is_contiguous() and source.is_contiguous()):
        raise KernelShapeError("blocks are copied between contiguous tensors")
    if ids.shape[0] == 0:
        return
    block_bytes = source[0].numel() * source.element_size()
    if block_bytes % 4:
        raise KernelShapeError(f"a block must be whole 4-byte words, got {block_bytes} bytes")
    words = block_bytes // 4
    launch(
        _move_blocks_kernel,
        (ids.shape[0], -(-words // _WORDS), 1),
        to,
        to.view(to.shape[0], -1).view(torch.int32),
        source.view(source.shape[0], -1).view(torch.int32),
        to_ids if to_ids is not None else ids,
        source_ids if source_ids is not None else ids,
        words=words,
        block=_WORDS,
        to_rows=to_ids is None,
        source_rows=source_ids is None,
        num_warps=8,
    )


@triton.jit
def _move_blocks_kernel(
    to,  # [blocks, words] i32
    source,  # [blocks, words] i32
    to_ids,  # [n] i64, unless to_rows
    source_ids,  # [n] i64, unless source_rows
    words: tl.constexpr,
    block: tl.constexpr,
    to_rows: tl.constexpr,
    source_rows: tl.constexpr,
):
    """One program: one stretch of one block. Words are moved as bits, whatever the pool's dtype."""
    row = tl.program_id(0).to(tl.int64)
    to_row = row
    source_row = row
    if not to_rows:
        to_row = tl.load(to_ids + row)
    if not source_rows:
        source_row = tl.load(source_ids + row)
    i = tl.program_id(1) * block + tl.arange(0, block)
    ok = i < words
    data = tl.load(source + source_row * words + i, mask=ok, other=0)
    tl.store(to + to_row * words + i, data, mask=ok)
