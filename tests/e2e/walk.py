"""The page docs/kubernetes.md as a walk: its `sh` blocks, run one after another as a reader would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^## (\d+)\. ", re.MULTILINE)
_TIMEOUT_S = 660


def sections(page: str) -> dict[int, list[str]]:
    """Number of a section → its blocks."""
    parts = _HEADING.split(page)
    return {int(number): _BLOCK.findall(text) for number, text in zip(parts[1::2], parts[2::2], strict=True)}


@dataclass
class Walk:
    """A reader's shell: a folder, variables, and what was left running in the background."""

    folder: Path
    environment: dict[str, str]
    _groups: list[int] = field(default_factory=list)

    def run(self, script: str) -> str:
        """What a block prints; fails the test with all of it if any command fails."""
        output = self.folder / f"output-{len(self._groups)}.log"
        with output.open("wb") as log:  # a file, since what stays in the background would keep a pipe open
            shell = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=self.folder,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._groups.append(shell.pid)
            status = shell.wait(_TIMEOUT_S)
        printed = output.read_text(errors="replace")
        print(f"\n$ {script.strip()}\n{printed}", flush=True)
        assert status == 0, f"status {status}:\n{script}\n{printed}"
        return printed

    def end(self) -> None:
        """Ends what was left running."""
        for group in self._groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
