"""Starting a kernel: on which device and under which lock."""

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor

from spillway.kernels.tuning.gpu import INTERPRETED

# The interpreter patches triton.language for the time of a launch, so two threads would interpret each other's kernels.
_interpreter_lock = threading.Lock()


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **options: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of ``on``; an empty grid is nothing to do."""
    if 0 in grid:
        return
    if INTERPRETED:
        with _interpreter_lock:
            kernel[grid](*arguments, **options)
        return
    elsewhere = on.is_cuda and on.device.index != torch.cuda.current_device()
    with torch.cuda.device(on.device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*arguments, **options)
