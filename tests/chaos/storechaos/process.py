"""The driver's end of a worker process: started in its network namespace, told what to do, killed, frozen, replaced."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from .ground import Clock, Network, python
from .worker import Command, Reply, Settings

REPLY_S = 120.0
"""No command takes so long, on however slow a machine."""


@dataclass
class WorkerProcess:
    """One worker over all its lives. ``life`` counts them; ``alive``: whether it should answer."""

    settings: Settings
    network: Network
    clock: Clock
    log: Path
    life: int = 0
    alive: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _replies: queue.Queue[bytes] = field(default_factory=queue.Queue)

    def start(self) -> None:
        """Begin a life. Its first reply, with its figures, comes once its store is open."""
        self.life += 1
        self._replies = queue.Queue()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.network.on(self.settings.number), *python("worker")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | self.clock.environment(),
            )
        self.alive = True
        threading.Thread(target=_pass_on, args=(self._process, self._replies), daemon=True).start()
        self._write(msgspec.json.encode(self.settings))

    def send(self, command: Command) -> None:
        """Give a command; `reply` brings what came of it."""
        self._write(msgspec.json.encode(command))

    def reply(self) -> Reply | None:
        """The answer to the oldest command that has none yet; None if the process was killed before."""
        try:
            line = self._replies.get(timeout=REPLY_S)
        except queue.Empty:
            self.signal(signal.SIGUSR1)  # have it write to its log where its threads are
            return Reply(error=f"worker {self.settings.number} does not answer", done=False)
        if line:
            return msgspec.json.decode(line, type=Reply)
        self._replies.put(b"")
        return None if not self.alive else Reply(error=f"worker {self.settings.number} ended by itself", done=False)

    def ask(self, name: str, *, seed: int = 0, seconds: float = 0.0) -> Reply | None:
        """`send` and `reply`."""
        self.send(Command(name, seed, seconds))
        return self.reply()

    def kill(self) -> None:
        """kill -9."""
        self.alive = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def end(self) -> None:
        """Wait for the end of a process that was told to close."""
        if self._process is not None:
            self._process.wait(REPLY_S)
        self.alive = False

    @property
    def fallen(self) -> bool:
        """Whether the process ended though nobody killed it or told it to close."""
        return self.alive and self._process is not None and self._process.poll() is not None

    @property
    def exit_code(self) -> int | None:
        """Of the last process, None while it runs."""
        return self._process.returncode if self._process is not None else None

    def _write(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it was killed meanwhile: `reply` tells


def _pass_on(process: subprocess.Popen[bytes], replies: queue.Queue[bytes]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        replies.put(line)
    replies.put(b"")
    process.stdout.close()
