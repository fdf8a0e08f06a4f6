"""Compiles the kernels with LLVM, all at once and once per machine, and keeps the object code.

The cache is one file named by a digest of everything the code depends on (this package's sources, llvmlite, the CPU);
it holds a checksum and plain object code: nothing is unpickled, and the second process links it in milliseconds. It
lies in ``$XDG_CACHE_HOME/spillway/kernels`` (or under ``~/.cache``). A folder that cannot be written, or that others
than its owner can write, is left alone, and each process compiles for itself, which takes seconds.
"""

import hashlib
import os
import stat
import tempfile
import threading
from functools import cache
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm

from spillway.kernels.cpu.launch import CompiledKernel

_HEADER = b"SPWKERN1"
_DIGEST_BYTES = 32
_lock = threading.Lock()


@cache
def kernel(name: str) -> CompiledKernel:
    """The kernel of that name, ready to run."""
    engine = _linked()
    address = engine.get_function_address(f"spillway_{name}")
    assert address, name
    return CompiledKernel(address, engine)


def warm_up() -> None:
    """Begin to compile, on a thread of its own since LLVM needs no lock of Python. `kernel` waits for it."""
    threading.Thread(target=_linked, name="spillway-kernels").start()


def _linked() -> llvm.ExecutionEngine:
    with _lock:
        return _engine()


@cache
def _engine() -> llvm.ExecutionEngine:
    """The process's kernels, linked; compiled first if this machine has not done so before."""
    folder = _cache_folder()
    path = folder / f"{_digest_of_everything()}.o" if folder else None
    code = _read(path) if path else None
    machine = _target_machine()
    if code is None:
        code = _compile(machine)
        if path:
            _write(path, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )


def _compile(machine: llvm.TargetMachine) -> bytes:
    """Object code of every kernel."""
    from spillway.kernels.cpu.jit.entries import ENTRIES  # only here: a process with a warm cache never needs them
    from spillway.kernels.cpu.jit.subset import translate

    module = llvm.parse_assembly(str(translate(ENTRIES)))
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


def _digest_of_everything() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    features = llvm.get_host_cpu_features().flatten()
    for part in (version("llvmlite"), llvm.get_process_triple(), llvm.get_host_cpu_name(), features):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _cache_folder() -> Path | None:
    """The folder, or None where it cannot be made or trusted: it holds code that will run."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(base).expanduser() / "spillway" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return None
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not os.access(folder, os.W_OK):
        return None
    return folder


def _read(path: Path) -> bytes | None:
    """The object code of a cache file; None if there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    header, code = content[: len(_HEADER) + _DIGEST_BYTES], content[len(_HEADER) + _DIGEST_BYTES :]
    return code if header == _HEADER + hashlib.sha256(code).digest() else None


def _write(path: Path, code: bytes) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(_HEADER + hashlib.sha256(code).digest() + code)
        Path(file.name).replace(path)
    except OSError:
        return  # a full or read-only disk costs the next process a compilation, nothing else
