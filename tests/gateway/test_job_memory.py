"""Memory of a job is a matter of the number of its lines, and little per line; not of what the lines hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from batch_files import paths_in, request, requests, write_input

MIB = 2**20
PEAK = """
import sys
sys.path.insert(0, {tests!r})
from batch_files import *
paths = paths_in(Path(sys.argv[1]))
with Job.open(paths, OPTIONS) as job:
    for line in job.pending():
        job.complete(line.index, answer(line))
with Job.open(paths, OPTIONS) as job:
    job.seal()
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def peak_bytes(directory: Path) -> int:
    """Peak resident memory of a process that runs the whole job."""
    script = PEAK.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, directory], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def test_forty_thousand_lines(tmp_path: Path) -> None:
    peaks = []
    for count in (100, 40_000):
        directory = tmp_path / str(count)
        directory.mkdir()
        write_input(directory, requests(count))
        peaks.append(peak_bytes(directory))
    assert peaks[1] - peaks[0] < 13 * MIB
    assert (tmp_path / "40000" / "out.jsonl").read_bytes().count(b"\n") == 40_000


def test_enormous_lines(tmp_path: Path) -> None:
    """A line of 7 MB is run; one of 20 MB and one of 500 MB (zeros, a hole in the file) are errors."""
    small = tmp_path / "small"
    small.mkdir()
    write_input(small, requests(3))
    paths = paths_in(tmp_path)
    with paths.input.open("wb") as file:
        file.write(request("long", "x" * 7_000_000) + b"\n" + request("longer", "x" * 20_000_000) + b"\n")
        file.seek(500_000_000, 1)
        file.write(b"\n" + request("last"))
    assert peak_bytes(tmp_path) - peak_bytes(small) < 64 * MIB
    assert len(paths.output.read_bytes().splitlines()) == 2
    assert paths.errors.read_bytes().count(b'"line_too_long"') == 2
