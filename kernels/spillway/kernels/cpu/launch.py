"""Runs a compiled kernel on torch's own threads.

torch's CPU ops run on an OpenMP pool. A second pool on the same cores makes both crawl, so the kernels are handed to
the very same OpenMP library; where it cannot be found (no OpenMP, or another than GNU's), Python threads do.

A kernel is one function ``kernel(address of its arguments)``. All threads run it at once; each takes tickets from a
counter in the arguments until none is left, so that the division of work never shows in the results.
"""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

TICKET, WORKER, SCRATCH, SCRATCH_BYTES = range(4)  # the first arguments of every kernel
FIRST_ARGUMENT = 4

Arguments = ctypes.Array[ctypes.c_int64]
_KERNEL_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


def _find_gnu_openmp() -> Callable[..., None] | None:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch loaded."""
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*")):
        parallel = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if parallel is not None:
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
            return parallel
    return None


_parallel = _find_gnu_openmp()
_python_threads: ThreadPoolExecutor | None = None
_local = threading.local()
_ALIGNMENT = 64


def scratch_address(size_bytes: int) -> int:
    """Address of at least that many bytes, kept per calling thread: the content lasts until the next call."""
    held: np.ndarray | None = getattr(_local, "scratch", None)
    if held is None or held.nbytes < size_bytes + _ALIGNMENT:
        held = _local.scratch = np.empty(size_bytes + _ALIGNMENT, dtype=np.uint8)
        _local.address = -(-held.ctypes.data // _ALIGNMENT) * _ALIGNMENT
    return int(_local.address)


class CompiledKernel:
    """A kernel's machine code as something Python can start."""

    __slots__ = ("_address", "_call", "_keep")

    def __init__(self, address: int, keep: object) -> None:
        self._address = address
        self._call = _KERNEL_TYPE(address)
        self._keep = keep  # owns the code

    def run(self, arguments: Arguments, threads: int) -> None:
        """Run on this many threads and wait; the arguments must stay alive until then."""
        address = ctypes.addressof(arguments)
        if threads <= 1:
            self._call(address)
        elif _parallel is not None:
            _parallel(self._address, address, threads, 0)
        else:
            self._run_on_python_threads(address, threads)

    def _run_on_python_threads(self, address: int, threads: int) -> None:
        global _python_threads  # noqa: PLW0603 - one pool per process, made when first needed
        if _python_threads is None:
            _python_threads = ThreadPoolExecutor(max(torch.get_num_threads() - 1, 1), "spillway-kernel")
        others = [_python_threads.submit(self._call, address) for _ in range(threads - 1)]
        self._call(address)
        for other in others:
            other.result()
