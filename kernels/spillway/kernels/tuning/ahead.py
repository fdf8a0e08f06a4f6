"""Compiling the kernels for a GPU that is not here, exactly as a launch would.

The ops themselves are called, on CPU tensors, with Triton's launch replaced by its warm-up: so every kernel is compiled
with the types, constants and alignment that the op's own launch gives it. Needs a process of its own, without
TRITON_INTERPRET.
"""

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from spillway.kernels.errors import BackendError
from spillway.kernels.tuning.gpu import INTERPRETED, Gpu, pretend

H200 = Gpu("NVIDIA H200", (9, 0), 132)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108)

# Shared memory that one block can have, in bytes, by compute capability (CUDA programming guide, technical
# specifications per compute capability).
SHARED_LIMIT_BYTES = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}

_INSTRUCTIONS = ("HGMMA", "HMMA", "IMMA", "LDGSTS")
_MAY_HOLD_THEM = re.compile(r"\bw?g?mma\b|\bcp\.async\b")  # in PTX: without these, machine code has none


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        kernel: name of its function.
        registers: per thread.
        stack_bytes, local_bytes: per thread; anything but 0 means registers were spilled to device memory.
        shared_bytes: per program, static and dynamic.
        warps: per program.
        instructions: how often the machine code has each instruction that tells what units it uses.
    """

    kernel: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    warps: int
    instructions: tuple[tuple[str, int], ...]

    def problem(self, gpu: Gpu) -> str | None:
        """Why this kernel must not ship for ``gpu``, or None."""
        if self.stack_bytes or self.local_bytes:
            return f"spills {self.stack_bytes} bytes of stack and {self.local_bytes} of local memory"
        limit = SHARED_LIMIT_BYTES[gpu.capability]
        if self.shared_bytes > limit:
            return f"wants {self.shared_bytes} bytes of shared memory of {limit}"
        return None


class _AbsentDriver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._number = 10 * capability[0] + capability[1]
        self._target = GPUTarget("cuda", self._number, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._number  # Triton keeps a cache of kernels per device: one per target here

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002 - Triton passes the device
        return 0


@contextlib.contextmanager
def compiling(gpu: Gpu) -> Iterator[list[Any]]:
    """Within, ops called on CPU tensors compile their kernels for ``gpu`` and collect them in the list given.

    Raises:
        BackendError: Triton is interpreting in this process.
    """
    if INTERPRETED:
        raise BackendError("kernels cannot be compiled in a process that interprets them (TRITON_INTERPRET=1)")
    compiled: list[Any] = []
    launch = JITFunction.run

    def warm_up(self: Any, *arguments: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001 - always warm
        compiled.append(launch(self, *arguments, warmup=True, **options))

    driver.set_active(_AbsentDriver(gpu.capability))
    JITFunction.run = warm_up
    try:
        with pretend(gpu):
            yield compiled
    finally:
        JITFunction.run = launch


def resources_of(compiled: Any) -> Resources:
    """Registers, memory and telling instructions of a compiled kernel, from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run_tool("cuobjdump", "--dump-resource-usage", file.name)
        # Disassembling takes half a second: only where there may be something to count.
        code = _run_tool("nvdisasm", "--print-code", file.name) if _MAY_HOLD_THEM.search(compiled.asm["ptx"]) else ""
    numbers = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    count = Counter(re.findall("|".join(_INSTRUCTIONS), code))
    return Resources(
        kernel=compiled.metadata.name,
        registers=int(numbers["REG"]),
        stack_bytes=int(numbers["STACK"]),
        local_bytes=int(numbers["LOCAL"]),
        shared_bytes=int(numbers["SHARED"]) + compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instructions=tuple((name, count[name]) for name in _INSTRUCTIONS if count[name]),
    )


def _run_tool(name: str, *arguments: str) -> str:
    tool = Path(str(triton.backends.nvidia.__file__)).parent / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout  # noqa: S603 - a file of Triton
