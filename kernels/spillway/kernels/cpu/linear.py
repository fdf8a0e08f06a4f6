"""Linear layers on the CPU: a weight packed once into panels, and the product with it.

Ahead of packed oneDNN on AVX2, most at few rows, and every row of the result is the same bits whatever shares the call.
"""

import ctypes
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from spillway.kernels.cpu.attention_call import check_rows
from spillway.kernels.cpu.compile import kernel
from spillway.kernels.cpu.launch import scratch_address
from spillway.kernels.cpu.linear_layout import (
    ARGUMENTS,
    BLOCK_BYTES,
    CHUNK_LIMIT,
    K_STEP,
    PANEL,
    PITCH,
    TILE_ROWS,
    VECTORS,
)
from spillway.kernels.errors import KernelDtypeError, KernelShapeError

_PACK = struct.Struct(f"{ARGUMENTS}q")
_Arguments = ctypes.c_int64 * ARGUMENTS
_HUGE_PAGE = 2 * 1024 * 1024
_PACKED_AT_ONCE = 64  # panels; bounds the memory that packing needs beside its result

# A task is long against the taking of a ticket, some 100 ns, and short, since threads wait for the last one.
_TASK_COST = 1 << 20  # multiply-adds, about 20 us
_ALONE_COST = 1 << 18  # below this, waking another thread costs more than it brings
_READING_ROWS = 16  # reading a weight costs about as much as multiplying this many rows by it


@dataclass(frozen=True, slots=True)
class _Shape:
    """A weight's sizes, as packed."""

    in_features: int
    packed_columns: int  # of the product; two for each output where gated
    out_features: int
    gated: bool
    bfloat16: bool

    @property
    def padded_k(self) -> int:
        return -(-self.in_features // K_STEP) * K_STEP

    @property
    def chunk(self) -> int:
        """k of a chunk, a function of k alone: as few chunks as the limit allows, about equally long."""
        chunks = -(-self.padded_k // CHUNK_LIMIT)
        return -(-self.padded_k // (chunks * K_STEP)) * K_STEP

    @property
    def panels(self) -> int:
        return self.packed_columns // PANEL

    @property
    def panel_bytes(self) -> int:
        return self.padded_k * PANEL * (2 if self.bfloat16 else 4)


@dataclass(frozen=True, slots=True)
class _Division:
    """How one call's work is cut; it never shows in the result."""

    blocks: int
    block_rows: int
    groups: int
    threads: int
    counters_bytes: int
    at_sums: int
    scratch_bytes: int


@lru_cache(maxsize=4096)
def _divide(rows: int, shape: _Shape, threads: int) -> _Division:
    """Blocks of rows that stay in the second-level cache, times groups of panels."""
    tiles = -(-rows // TILE_ROWS)
    chunks = -(-shape.padded_k // shape.chunk)
    most_tiles = max(BLOCK_BYTES // (chunks * PITCH * TILE_ROWS), 1)
    blocks = -(-tiles // most_tiles)
    block_rows = -(-tiles // blocks) * TILE_ROWS
    panel_cost = (block_rows + _READING_ROWS) * shape.padded_k * PANEL
    groups = min(max(-(-shape.panels * panel_cost // _TASK_COST), threads), shape.panels)
    if blocks * shape.panels * panel_cost < _ALONE_COST:
        groups = 1
    counters_bytes = -(-blocks * 8 // 64) * 64
    at_sums = chunks * block_rows * PITCH
    scratch_bytes = -(-(at_sums + block_rows * PANEL * 4) // 4096) * 4096 + 64
    return _Division(blocks, block_rows, groups, min(threads, blocks * groups), counters_bytes, at_sums, scratch_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """``x · weightᵀ + bias`` in float32, over a packed copy of the weight.

    Every number of the result is the sum in order of chains of fused multiply-adds, each over at most CHUNK_LIMIT
    inputs, then the bias. So a row's bits depend on that row and the weight alone: not on the other rows, the threads,
    or the machine.
    """

    shape: _Shape
    panels: Tensor
    """``[panels, k, PANEL]``, flat, as bytes."""
    bias: Tensor | None
    """In the order of the panels, padded."""

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> "PackedLinear":
        """Copy a weight into panels; it and the bias may be reused afterwards.

        Args:
            weight: ``[out, in]``, float32, or bfloat16: then it is stored so, at half the memory and reading, and
                computed with as the float32 numbers that it stands for.
            bias: ``[out]``, or None.
            gated: the first half of the outputs are gates, the second what they gate: the result is
                ``silu(first) * second``, of half the width.

        Raises:
            KernelShapeError: not a matrix, an empty one, a bias of another length, or an odd number of outputs to gate.
            KernelDtypeError: another dtype.
        """
        if weight.dim() != 2 or weight.numel() == 0 or (gated and weight.shape[0] % 2):
            raise KernelShapeError(f"a weight is [out, in], with an even out to be gated, got {tuple(weight.shape)}")
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise KernelDtypeError(f"a weight is float32 or bfloat16, got {weight.dtype}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise KernelShapeError(f"a bias for {tuple(weight.shape)} is [{weight.shape[0]}], got {tuple(bias.shape)}")
        outputs, inputs = weight.shape
        bfloat16 = weight.dtype == torch.bfloat16
        columns = -(-outputs // PANEL) * PANEL
        shape = _Shape(inputs, columns, outputs // 2 if gated else outputs, gated, bfloat16)
        panels = _zeros(shape.panels * shape.panel_bytes)
        _fill_panels(panels, weight.detach(), shape)
        packed_bias = None
        if bias is not None:
            packed_bias = _in_order(bias.detach().float()[:, None], 0, shape.panels, gated).reshape(-1).contiguous()
        return cls(shape, panels, packed_bias)

    def __call__(self, x: Tensor, out: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Multiply.

        Args:
            x: ``[rows, in]`` float32; rows may lie apart, their numbers may not.
            out: ``[rows, out]`` float32 to write into; not x.
            residual: ``[rows, out]`` float32 to add; may be ``out``.

        Returns:
            ``out``.

        Raises:
            KernelShapeError, KernelDtypeError: the tensors do not fit.
        """
        shape = self.shape
        rows = x.shape[0]
        x_stride = check_rows("x", x, torch.Size((rows, shape.in_features)), torch.float32, shape.in_features)
        size = torch.Size((rows, shape.out_features))
        if out is None:
            out = torch.empty(size, dtype=torch.float32)
        out_stride = check_rows("out", out, size, torch.float32, shape.out_features)
        residual_stride = 0
        if residual is not None:
            residual_stride = check_rows("residual", residual, size, torch.float32, shape.out_features)
        if rows == 0:
            return out
        cut = _divide(rows, shape, torch.get_num_threads())
        base = scratch_address(cut.counters_bytes + cut.threads * cut.scratch_bytes)
        ctypes.memset(base, 0, cut.counters_bytes)
        arguments = _Arguments()
        _PACK.pack_into(
            arguments, 0, 0, 0, base + cut.counters_bytes, cut.scratch_bytes,
            x.data_ptr(), x_stride, rows, shape.in_features, shape.chunk,
            self.panels.data_ptr(), shape.panels, shape.panel_bytes, shape.bfloat16, shape.out_features,
            out.data_ptr(), out_stride, 0 if self.bias is None else self.bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), residual_stride, shape.gated,
            cut.blocks, cut.block_rows, cut.groups, base, cut.threads, cut.at_sums,
        )  # fmt: skip
        kernel("linear").run(arguments, cut.threads)
        return out


def _zeros(size_bytes: int) -> Tensor:
    """Zeroed memory of its own, on huge pages as far as whole ones fit: a panel is read across many small pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, size_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    huge_bytes = size_bytes // _HUGE_PAGE * _HUGE_PAGE
    if huge_bytes:
        memory.madvise(mmap.MADV_HUGEPAGE, start, huge_bytes)
    return whole[start : start + size_bytes]


def _in_order(weight: Tensor, first_panel: int, last_panel: int, gated: bool) -> Tensor:
    """Some panels' columns as ``[panels, VECTORS, 2, 8, in]``: halves of eight, of which gated ones are gate and up."""
    parts = weight.unflatten(0, (2, -1)) if gated else weight[None]
    width = PANEL // len(parts)
    rows = parts[:, first_panel * width : last_panel * width]
    rows = functional.pad(rows, (0, 0, 0, (last_panel - first_panel) * width - rows.shape[1]))
    if gated:
        return rows.unflatten(1, (-1, VECTORS, 8)).permute(1, 2, 0, 3, 4)
    return rows[0].unflatten(0, (-1, VECTORS, 2, 8))


def _fill_panels(panels: Tensor, weight: Tensor, shape: _Shape) -> None:
    """Write ``[panels, k, VECTORS, 2, 8]``; in bfloat16 ``[..., 8, 2]``, a word for a column of each half."""
    halves = (8, 2) if shape.bfloat16 else (2, 8)
    order = (0, 4, 1, 3, 2) if shape.bfloat16 else (0, 4, 1, 2, 3)
    target = panels.view(weight.dtype).view(shape.panels, shape.padded_k, VECTORS, *halves)
    for first in range(0, shape.panels, _PACKED_AT_ONCE):
        last = min(first + _PACKED_AT_ONCE, shape.panels)
        target[first:last, : shape.in_features] = _in_order(weight, first, last, shape.gated).permute(order)
