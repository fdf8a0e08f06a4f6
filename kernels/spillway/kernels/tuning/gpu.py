"""The device the kernels run on, as far as they care."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the launchers need to know about a device.

    Attributes:
        name: as the driver reports it; finds the tuning table.
        capability: compute capability, major and minor.
        multiprocessors: sizes the fixed grids.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int


# What CPU tensors are taken to lie on: the interpreter's small GPU keeps fixed grids short.
_pretended = Gpu("interpreter", (9, 0), 2)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device; for the CPU the one pretended at the moment."""
    return _pretended if device.type == "cpu" else _real_gpu(device)


@lru_cache
def _real_gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


@contextlib.contextmanager
def pretend(gpu: Gpu) -> Iterator[None]:
    """Take CPU tensors to lie on ``gpu``: how kernels are compiled for a GPU that is not here."""
    global _pretended  # noqa: PLW0603 - one process pretends one GPU at a time
    before, _pretended = _pretended, gpu
    try:
        yield
    finally:
        _pretended = before


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()
