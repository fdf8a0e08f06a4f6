"""Where the Triton suite runs: on a GPU, or under Triton's interpreter in a process started for it.

The interpreter has to be chosen before Triton is imported, so `test_triton_interpreted` runs this suite again in a
process of its own; here it is skipped where there is no GPU.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ROUNDS = 1 if INTERPRETED else 6  # how many times as many examples a GPU can afford: it compiles for each, seconds


def only_here() -> list[pytest.MarkDecorator]:
    """Marks of a module whose tests need Triton to run."""
    if INTERPRETED:
        return []
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return [pytest.mark.gpu, no_gpu, pytest.mark.timeout(1800)]


# Relative error in the Frobenius norm: a few roundings of the dtype of the products' operands.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """``|got - wanted| / |wanted|``; NaN if got has one."""
    got, wanted = got.detach().cpu().double(), wanted.cpu().double()
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def assert_close(got: Tensor, wanted: Tensor, bound: float) -> None:
    """Relative error within the bound, every element a number."""
    assert not got.isnan().any(), "an element was never written, or is not a number"
    assert relative_error(got, wanted) <= bound


def assert_same_lse(got: Tensor, wanted: Tensor, bound: float = 2e-3) -> None:
    """Log-sum-exps agree, -inf included; they are compared absolutely, since a shift of one scales all weights."""
    got, wanted = got.cpu().double(), wanted.double()
    assert torch.equal(got == -torch.inf, wanted == -torch.inf)
    seen = wanted > -torch.inf
    assert ((got - wanted)[seen].abs() <= bound).all()


def here(tensor: Tensor) -> Tensor:
    """A copy on the device under test."""
    return tensor.clone().to(DEVICE)


@dataclass(frozen=True)
class Paged:
    """A pool with the tables of some sequences, and the same tensors on the CPU for the reference."""

    pool: Tensor
    tables: Tensor
    context_lens: Tensor

    @property
    def here(self) -> tuple[Tensor, Tensor, Tensor]:
        """On the device under test."""
        return here(self.pool), here(self.tables), here(self.context_lens)


def paged(
    lens: list[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int,
    shared_blocks: int = 0,
) -> Paged:
    """A pool ``[blocks, 3 layers, 2, *shape]`` of normal numbers with shuffled tables.

    Whatever no sequence holds is poison: blocks of no table, slots behind a context, and the table entries behind it
    point to a poisoned block.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_heads, block_tokens, head_dim = shape
    needed = [-(-n // block_tokens) for n in lens]
    width = max(needed, default=0) + 2
    blocks = sum(needed) + 2
    values = torch.randn(blocks, 3, 2, kv_heads, block_tokens, head_dim, generator=generator)
    ids = torch.randperm(blocks, generator=generator)
    tables = torch.full((len(lens), width), int(ids[-1]), dtype=torch.int32)
    values[ids[-2:]] = torch.nan
    used = 0
    for row, (length, count) in enumerate(zip(lens, needed, strict=True)):
        tables[row, :count] = ids[used : used + count].int()
        used += count
        tables[row, :shared_blocks] = tables[0, :shared_blocks]
        if length % block_tokens:
            values[int(tables[row, count - 1]), :, :, :, length % block_tokens :] = torch.nan
    if dtype is torch.int8:
        stored = (values.nan_to_num(127) * 40).round().clamp(-128, 127).to(dtype)
    else:
        stored = values.to(dtype)
    return Paged(stored, tables, torch.tensor(lens, dtype=torch.int32))
