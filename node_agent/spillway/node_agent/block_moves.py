"""Blocks between the pool and the store: in place where the pool is host memory, else through staging buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spillway.kernels import gather_blocks, scatter_blocks
from spillway.kvstore import BlockHash, BlockStore

STAGING_BYTES = 64 << 20
"""Of each buffer, however many blocks are moved."""

Move = TypeVar("Move")


class DirectMoves:
    """For a pool in host memory: the store reads and writes its blocks where they are."""

    def __init__(self, pool: Tensor) -> None:
        self._rows = _rows(pool)

    def save(self, spills: Sequence[tuple[int, BlockHash]], store: BlockStore) -> None:
        """Hand copies of blocks to the store."""
        store.put_many([(name, self._rows[block]) for block, name in spills])

    def load(self, fetches: Sequence[tuple[BlockHash, int]], store: BlockStore) -> list[bool]:
        """Bring blocks from the store; where the answer is False, what is in the block afterwards means nothing."""
        return store.get_many([(name, self._rows[block]) for name, block in fetches])


class StagedMoves:
    """For a pool on a device: in bulk, through a buffer there and one in pinned host memory, made at the first move.

    Every copy between them waits for its end before the host side is read or written again: bytes are handed to the
    store only once they have arrived, and a buffer is filled anew only once it was emptied.
    """

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        block_bytes = pool[0].numel() * pool.element_size()
        self._at_once = max(1, min(pool.shape[0], STAGING_BYTES // block_bytes))
        self._buffers: tuple[Tensor, Tensor] | None = None

    def save(self, spills: Sequence[tuple[int, BlockHash]], store: BlockStore) -> None:
        """As `DirectMoves.save`."""
        for part in self._parts(spills):
            device, host = self._first(len(part))
            gather_blocks(self._pool, self._ids([block for block, _ in part]), device)
            host.copy_(device)
            store.put_many([(name, row) for (_, name), row in zip(part, _rows(host), strict=True)])

    def load(self, fetches: Sequence[tuple[BlockHash, int]], store: BlockStore) -> list[bool]:
        """As `DirectMoves.load`."""
        answers: list[bool] = []
        for part in self._parts(fetches):
            device, host = self._first(len(part))
            answers += store.get_many([(name, row) for (name, _), row in zip(part, _rows(host), strict=True)])
            device.copy_(host)
            scatter_blocks(self._pool, self._ids([block for _, block in part]), device)
        return answers

    def _first(self, blocks: int) -> tuple[Tensor, Tensor]:
        """The first rows of both buffers, ``[blocks, ...block]``."""
        if self._buffers is None:
            shape, dtype = (self._at_once, *self._pool.shape[1:]), self._pool.dtype
            pinned = self._pool.device.type == "cuda"
            device = torch.empty(shape, dtype=dtype, device=self._pool.device)
            self._buffers = device, torch.empty(shape, dtype=dtype, pin_memory=pinned)
        device, host = self._buffers
        return device[:blocks], host[:blocks]

    def _ids(self, blocks: list[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._pool.device)

    def _parts(self, moves: Sequence[Move]) -> Iterator[Sequence[Move]]:
        return (moves[start : start + self._at_once] for start in range(0, len(moves), self._at_once))


def _rows(blocks: Tensor) -> npt.NDArray[np.uint8]:
    """``[blocks, block bytes]``, the same memory."""
    rows: npt.NDArray[np.uint8] = blocks.view(torch.uint8).reshape(blocks.shape[0], -1).numpy()
    return rows
