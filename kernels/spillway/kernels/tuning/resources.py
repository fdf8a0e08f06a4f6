"""The resource table: ``python -m spillway.kernels.tuning.resources [--markdown FILE]``.

Compiles every case ahead for an A100 and an H200, in two processes, and prints registers, shared memory, how many
programs fit on a multiprocessor, and what the machine code uses. Exit code 1 if a kernel spills or wants too much.
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from spillway.kernels.tuning.ahead import A100, H200, SHARED_LIMIT_BYTES, Resources, compiling, resources_of
from spillway.kernels.tuning.gpu import Gpu

_REGISTERS = 65536  # of a multiprocessor; granted in units of 256 per warp
_WARPS = 64
_RESERVED_SHARED_BYTES = 1024  # the system's own, of each program


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel of one case on one GPU."""

    gpu: Gpu
    case: str
    resources: Resources

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at once."""
        taken = self.resources
        warp_registers = -(-taken.registers * 32 // 256) * 256
        by_registers = _REGISTERS // (warp_registers * taken.warps)
        shared = SHARED_LIMIT_BYTES[self.gpu.capability] + _RESERVED_SHARED_BYTES
        by_shared = shared // (taken.shared_bytes + _RESERVED_SHARED_BYTES)
        return min(by_registers, by_shared, _WARPS // taken.warps, 32)

    @property
    def problem(self) -> str | None:
        """Why the kernel must not ship, or None."""
        return self.resources.problem(self.gpu)


def compile_case(gpu: Gpu, name: str) -> list[Row]:
    """Every kernel that one case launches, compiled for ``gpu``."""
    from spillway.kernels.tuning.cases import CASES

    with compiling(gpu) as kernels:
        CASES[name]()
    return [Row(gpu, name, resources_of(kernel)) for kernel in kernels]


def compile_all(gpus: tuple[Gpu, ...] = (A100, H200), workers: int = 2) -> list[Row]:
    """All cases on all GPUs that can run them, in the order of the cases."""
    from spillway.kernels.tuning.cases import CASES, FP8_CASES

    jobs = [(gpu, name) for name in CASES for gpu in gpus if gpu.capability >= (8, 9) or name not in FP8_CASES]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(compile_case, *zip(*jobs, strict=True))
        return [row for rows in found for row in rows]


def markdown(rows: list[Row]) -> str:
    """The table, one line for each kernel and GPU; a kernel that several cases share is listed once."""
    lines = [
        "| case | kernel | target | warps | registers | shared, KiB | programs/SM | products | copies | spill, bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for row in rows:
        taken, target = row.resources, f"sm_{row.gpu.capability[0]}{row.gpu.capability[1]}"
        if (taken, target) in seen:
            continue
        seen.add((taken, target))
        count = dict(taken.instructions)
        products = next((f"{count[name]} {name}" for name in ("HGMMA", "IMMA", "HMMA") if count.get(name)), "-")
        copies = f"{count['LDGSTS']} LDGSTS" if count.get("LDGSTS") else "-"
        lines.append(
            f"| {row.case} | {taken.kernel.strip('_').removesuffix('_kernel')} | {target} | {taken.warps} "
            f"| {taken.registers} | {taken.shared_bytes / 1024:.1f} | {row.programs} | {products} | {copies} "
            f"| {taken.stack_bytes + taken.local_bytes} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table; with --markdown write it to a file, too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    options = parser.parse_args()
    rows = compile_all()
    table = markdown(rows)
    print(table, end="")
    if options.markdown:
        options.markdown.write_text(table)
    problems = [(row, problem) for row in rows if (problem := row.problem)]
    for row, problem in problems:
        print(f"{row.case} on {row.gpu.name}: {row.resources.kernel} {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
