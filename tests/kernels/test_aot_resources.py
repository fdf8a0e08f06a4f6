"""Every kernel compiles for GPUs that are not here, spills nothing and fits in their shared memory."""

import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

pytestmark = pytest.mark.timeout(1800)  # a minute and a half of compiling, on a machine that may be busy
Cells = dict[str, str]


@pytest.fixture(scope="module")
def table() -> list[Cells]:
    """What every case compiles to, made in a process of its own that does not interpret Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "spillway.kernels.tuning.resources"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700)
    print(done.stdout, done.stderr)  # shown with -s, and when a test fails
    # 1 is the command's own verdict, which the tests below take apart
    assert done.returncode in (0, 1)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def test_no_kernel_spills(table: list[Cells]) -> None:
    assert [row for row in table if row["spill, bytes"] != "0"] == []


def test_every_kernel_fits_on_a_multiprocessor(table: list[Cells]) -> None:
    assert [row for row in table if row["programs/SM"] == "0"] == []


def test_every_op_is_compiled_for_both_targets(table: list[Cells]) -> None:
    targets = defaultdict(set)
    for row in table:
        targets[row["kernel"]].add(row["target"])
    assert set(targets) == {
        "attend_prefix", "dequantize", "flash_prefill", "merge_spans", "merge_states", "move_blocks", "paged_decode",
        "quantize", "rms_norm", "rope_write_kv", "sample", "score_sums", "silu_mul", "write_kv",
    }  # fmt: skip
    assert all(found == {"sm_80", "sm_90"} for found in targets.values())


def test_matrix_products_run_on_the_tensor_cores_of_their_time(table: list[Cells]) -> None:
    attention = [row for row in table if row["kernel"] in ("flash_prefill", "attend_prefix", "paged_decode")]
    assert attention
    assert all("MMA" in row["products"] for row in attention)
    # Hopper's own products take 64 rows: prefill has them, one query's group of heads has not.
    tall = [row for row in attention if row["kernel"] != "paged_decode" and "fp32" not in row["case"]]
    assert all("HGMMA" in row["products"] for row in tall if row["target"] == "sm_90")


def test_keys_and_values_are_copied_asynchronously(table: list[Cells]) -> None:
    attention = [row for row in table if row["kernel"] in ("flash_prefill", "attend_prefix", "paged_decode")]
    assert all("LDGSTS" in row["copies"] for row in attention)


def test_spills_are_seen() -> None:
    """The check is worth something: a tile far too large for its registers is found out."""
    script = (
        "import importlib\n"
        "from spillway.kernels.tuning import cases, tables\n"
        "from spillway.kernels.tuning.ahead import H200\n"
        "from spillway.kernels.tuning.resources import compile_case\n"
        "op = importlib.import_module('spillway.kernels.ops.flash_prefill')\n"
        "op.prefill_tile = lambda *args, **kwargs: tables.PrefillTile(128, 64, 4, 1)\n"
        "print(compile_case(H200, 'prefill d128')[0].problem)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500, check=True
    )
    assert "spills" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_this_gpu_has_a_table_or_a_family() -> None:
    from spillway.kernels.tuning.gpu import gpu_of
    from spillway.kernels.tuning.tables import TileKey, find_entry

    assert find_entry(gpu_of(torch.device("cuda", 0)), "prefill", TileKey(128, 16, 16, biased=False))
