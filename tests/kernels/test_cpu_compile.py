"""Compiling once per machine: what is cached, where, and what is never trusted; and the language it starts from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spillway.kernels import cpu
from spillway.kernels.cpu import compile as compiling
from spillway.kernels.cpu import launch
from spillway.kernels.cpu.jit.subset import Device, SubsetError, device, translate

USE = """
import sys, torch
from spillway import kernels
out = kernels.rms_norm(torch.ones(2, 16), torch.ones(16), 0.0)
print(float(out.sum()), "spillway.kernels.cpu.jit" in sys.modules)
"""


def use(cache: Path | None, home: Path) -> str:
    """Run an op in a process of its own; says whether anything was compiled in it."""
    environment = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"}
    environment |= {"HOME": str(home)} | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    total, compiled = done.stdout.split()
    assert float(total) == 32.0
    return "compiled" if compiled == "True" else "from the cache"


def test_the_second_process_links_what_the_first_compiled(tmp_path: Path) -> None:
    assert use(tmp_path / "cache", tmp_path) == "compiled"
    (file,) = (tmp_path / "cache/spillway/kernels").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert use(tmp_path / "cache", tmp_path) == "from the cache"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert compiling._read(file) is None, "a damaged file is not linked"


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiling._cache_folder()
    assert folder == tmp_path / "spillway/kernels"
    folder.chmod(0o777)
    assert compiling._cache_folder() is None


def test_without_a_place_to_keep_it_the_code_is_compiled_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert compiling._cache_folder() is None
    compiling._write(blocked / "x.o", b"code")  # a failed write is no error
    assert compiling._read(blocked / "x.o") is None


def test_python_threads_do_where_openmp_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 512)
    wanted = cpu.silu_mul(x)
    monkeypatch.setattr(launch, "_parallel", None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpu.silu_mul(x), wanted)
    finally:
        torch.set_num_threads(before)


def test_ops_may_run_from_several_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    pool = torch.randn(40, 1, 2, 2, 16, 64)
    params = __import__("spillway.kernels").kernels.AttentionParams(0.125)
    tables, contexts = torch.randperm(40).int()[None], torch.tensor([600], dtype=torch.int32)
    queries = torch.randn(16, 1, 4, 64)
    wanted = [cpu.paged_decode(q, pool, 0, tables, contexts, params) for q in queries]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            got = list(threads.map(lambda q: cpu.paged_decode(q, pool, 0, tables, contexts, params), queries))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@device
def unknown_name(count: int) -> int:
    """Uses a name that is no number."""
    return count + nowhere  # noqa: F821 - what is refused


@device
def mixes_types(count: int) -> float:
    """Adds an int to a float."""
    return count + 1.5


@device
def unknown_statement(count: int) -> int:
    """Uses a statement outside the subset."""
    with count:
        pass
    return count


@device  # noqa: RET503 - what is refused
def no_result(count: int) -> int:
    """Ends without a result on one path."""
    if count > 3:
        return 1


@pytest.mark.parametrize("function", [unknown_name, mixes_types, unknown_statement, no_result])
def test_code_outside_the_subset_is_refused(function: Device) -> None:
    with pytest.raises(SubsetError, match=function.name):
        translate([function])


def test_parameters_need_types() -> None:
    with pytest.raises(SubsetError, match="annotated"):
        device(lambda x: x)
