"""Where a job reads and writes, and everything that can be wrong with that before any work is done."""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from spillway.api.errors import InputError, JobLockedError, OutputExistsError, OutputPathError, StorageError

DIRECTORY_SUFFIX = ".spillway"


@dataclass(frozen=True, slots=True)
class JobPaths:
    """The three files of a job. The error file is written only if a line fails."""

    input: Path
    output: Path
    errors: Path

    def resolved(self) -> JobPaths:
        """The same with symlinks followed: the job directory lies beside the real output. Raises OutputPathError."""
        try:
            return JobPaths(self.input, self.output.resolve(), self.errors.resolve())
        except (OSError, RuntimeError) as error:
            raise OutputPathError(
                f"cannot resolve {self.output} or {self.errors}: {error}", "Check the paths."
            ) from error

    @property
    def directory(self) -> Path:
        """The job directory: `<output>.spillway`."""
        return self.output.with_name(self.output.name + DIRECTORY_SUFFIX)

    def check(self) -> None:
        """Raises OutputPathError or InputError for paths that cannot work, whatever the job's state."""
        try:
            self.directory.exists()  # its name is the longest
            if not self.input.exists():
                raise InputError(f"the input {self.input} does not exist", "Check the path.")
            _check_target("output", self.output)
            _check_target("error file", self.errors)
            _check_distinct("output", self.output, "input", self.input)
            _check_distinct("error file", self.errors, "input", self.input)
            _check_distinct("error file", self.errors, "output", self.output)
        except OSError as error:  # a name too long, a folder that may not be entered
            raise OutputPathError(f"cannot use {error.filename}: {error.strerror}", "Check the path.") from error

    def check_report(self, report: Path) -> None:
        """Raises OutputPathError if a report cannot be written there, or would overwrite one of the three."""
        try:
            _check_target("report", report)
            for name, path in (("input", self.input), ("output", self.output), ("error file", self.errors)):
                _check_distinct("report", report, name, path)
        except OSError as error:
            raise OutputPathError(f"cannot use {error.filename}: {error.strerror}", "Check the path.") from error

    def check_nothing_to_overwrite(self) -> None:
        """Raises OutputExistsError if a target exists that this job has not written."""
        for name, path in (("output", self.output), ("error file", self.errors)):
            if path.exists():
                raise OutputExistsError(
                    f"the {name} {path} exists, and no job is under way that writes it",
                    "Choose another one, remove it, or pass --restart to replace it.",
                )


def errors_beside(output: Path) -> Path:
    """`.errors` before the ending of the output. Raises OutputPathError for what is no file's name."""
    if not output.name:
        raise OutputPathError(f"the output {output} is a directory", "Name a file in it.")
    return output.with_name(f"{output.stem}.errors{output.suffix}")


def _check_target(name: str, path: Path) -> None:
    parent = path.parent
    if not parent.exists():
        raise OutputPathError(f"the directory {parent} of the {name} does not exist", f"Create it: mkdir -p {parent}")
    if not parent.is_dir():
        raise OutputPathError(f"{parent}, where the {name} should be, is not a directory", "Choose another path.")
    if path.is_dir():
        raise OutputPathError(f"the {name} {path} is a directory", "Name a file in it.")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OutputPathError(
            f"the {name} {path} is not a regular file", "Name a file; results are written in one piece."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputPathError(f"the directory {parent} of the {name} is not writable", "Check its permissions.")


def _check_distinct(name: str, path: Path, other_name: str, other: Path) -> None:
    same_file = path.exists() and other.exists() and path.samefile(other)
    if same_file or path.resolve() == other.resolve():
        raise OutputPathError(f"the {name} {path} is the same file as the {other_name}", f"Choose another {name}.")


class JobLock:
    """Exclusive hold on a job directory, by flock: it ends with the process, however that ends."""

    def __init__(self, directory: Path) -> None:
        """Creates the directory if needed and locks it. Raises JobLockedError, OutputPathError, StorageError."""
        self._directory, self._path = directory, directory / "lock"
        while True:
            self._fd = self._open()
            try:
                self._take()
                if self._is_current():
                    self._sign()
                    break
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)  # its former holder removed it in between

    def held(self) -> bool:
        """Whether it still keeps others out: locked, and the file is the one that they would open.

        Asks for the lock once more. That changes nothing where we have it; a file server that forgot us gives it again
        only if nobody else has it.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return self._is_current()
        except OSError:
            return False

    def release(self, *, remove_if_unused: bool = False) -> None:
        """Lets go; on request removes a job directory that holds nothing but the lock. Safe to call twice."""
        if self._fd < 0:
            return
        if remove_if_unused and list(self._directory.iterdir()) == [self._path]:
            self._path.unlink()
            self._directory.rmdir()
        os.close(self._fd)
        self._fd = -1

    def _open(self) -> int:
        try:
            self._directory.mkdir(exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputPathError(
                f"cannot create the job directory {self._directory}: {error.strerror}",
                "Check the path and its permissions.",
            ) from error

    def _take(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 20, 0).strip()
            raise JobLockedError(self._directory, int(holder) if holder.isdigit() else None) from None
        except OSError as error:
            raise StorageError(
                f"cannot lock {self._directory}: {error.strerror}", "Its file system must support flock."
            ) from error

    def _sign(self) -> None:
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}", "Check the disk.") from error

    def _is_current(self) -> bool:
        """Whether the file that was locked still is the one that others would open."""
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        except FileNotFoundError:
            return False
