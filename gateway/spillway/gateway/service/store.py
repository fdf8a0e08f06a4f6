"""Jobs on disk.

<data>/lock, owner.json           one gateway at a time: see claim.py
<data>/incoming/<id>/             uploads under way; what a stopped gateway left here is thrown away
<data>/inputs/<sha256>.jsonl      every input once: the jobs' input.jsonl are links to it, counted by the file system
<data>/jobs/<id>/job.json         the spec, with a copy: a folder without one does not exist here
                 input.jsonl      as uploaded
                 output.jsonl     sealed results
                 errors.jsonl     sealed errors
                 output.jsonl.spillway/   the job directory of `spillway.gateway.job`
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spillway.api.errors import JobCorruptError
from spillway.gateway.durable import remove_twice, sync_directory
from spillway.gateway.paths import JobPaths
from spillway.gateway.service.errors import NotFoundError, Reason, ResourceError
from spillway.gateway.service.spec import JobSpec, new_job_id

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Where the files of one job are."""

    path: Path

    @property
    def spec(self) -> Path:
        """The spec's file."""
        return self.path / "job.json"

    @property
    def paths(self) -> JobPaths:
        """The three files that a Job works with."""
        return JobPaths(self.path / "input.jsonl", self.path / "output.jsonl", self.path / "errors.jsonl")


class Upload:
    """An input on its way in. `close` throws it away unless it was adopted."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.id = folder.name
        self.folder = JobFolder(folder)
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._file = self.folder.paths.input.open("wb")
        self.size_bytes = 0
        self._newlines, self._last = 0, b"\n"
        self.check: Callable[[], None] = lambda: None
        """Is asked after each piece; raises what the upload is to be refused with."""

    @property
    def sha256(self) -> str:
        """Digest of what was written so far, in hex."""
        return self._digest.hexdigest()

    @property
    def num_lines(self) -> int:
        """Lines written so far, blank ones included."""
        return self._newlines + (self._last != b"\n")

    def write(self, data: bytes) -> None:
        """Takes in the next piece. Raises ResourceError if the input grows over a limit or the disk is full."""
        if not data:
            return
        self._newlines, self._last = self._newlines + data.count(b"\n"), data[-1:]
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise ResourceError(Reason.INPUT_TOO_LARGE, f"the input is larger than {self._max_bytes} bytes")
        self.check()
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"the input cannot be stored: {error.strerror}") from error

    def finish(self) -> None:
        """Makes the content durable. Raises ResourceError."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"the input cannot be stored: {error.strerror}") from error

    def close(self) -> None:
        """Throws away what was not adopted by the store."""
        self._file.close()
        shutil.rmtree(self.folder.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class StoredInput:
    """Content in the data directory, outside of jobs."""

    path: Path
    sha256: str
    size_bytes: int
    num_lines: int


class LinkedInput:
    """The input of a job to be that is stored already: a second name for it. Used like an `Upload`."""

    def __init__(self, folder: Path, content: StoredInput) -> None:
        """Raises NotFoundError if the content is gone, ResourceError."""
        self.id = folder.name
        self.folder = JobFolder(folder)
        self.sha256, self.size_bytes, self.num_lines = content.sha256, content.size_bytes, content.num_lines
        try:
            folder.mkdir(parents=True)
            self.folder.paths.input.hardlink_to(content.path)
        except OSError as error:
            self.close()
            if isinstance(error, FileNotFoundError):
                raise NotFoundError(Reason.FILE_NOT_FOUND, "the input was deleted") from None
            raise ResourceError(Reason.STORAGE, f"the input cannot be linked: {error.strerror}") from error

    def finish(self) -> None:
        """Makes the new name durable. Raises ResourceError."""
        try:
            sync_directory(self.folder.path)
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"the input cannot be linked: {error.strerror}") from error

    def close(self) -> None:
        """Takes the name away unless it was adopted by the store."""
        shutil.rmtree(self.folder.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was found: the jobs, ids of those whose spec was torn and came from its copy, and what could not be read."""

    specs: list[JobSpec]
    mended: list[str]
    unreadable: list[str]


class JobStore:
    """The jobs in a data directory. Whoever makes one has claimed the directory."""

    def __init__(self, data: Path) -> None:
        """Throws away what an earlier gateway left half done. Raises OSError."""
        self._incoming, self._jobs, self._inputs = data / "incoming", data / "jobs", data / "inputs"
        shutil.rmtree(self._incoming, ignore_errors=True)
        for folder in (self._jobs, self._inputs):
            folder.mkdir(exist_ok=True)
        for shared in self._inputs.iterdir():
            _remove_if_unused(shared)

    def upload(self, max_bytes: int) -> Upload:
        """Begins an upload."""
        return Upload(self._incoming / new_job_id(), max_bytes)

    def link(self, content: StoredInput) -> LinkedInput:
        """Begins a job from what is stored already. Raises NotFoundError, ResourceError."""
        return LinkedInput(self._incoming / new_job_id(), content)

    def release(self, sha256: str) -> None:
        """Removes an input that nothing refers to any more."""
        _remove_if_unused(self._inputs / f"{sha256}.jsonl")

    def share(self, upload: Upload) -> None:
        """Makes a finished upload one with the equal input that is there, or the one to share. Raises ResourceError."""
        try:
            self._share(upload.folder.paths.input, self._inputs / f"{upload.sha256}.jsonl")
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"the input cannot be stored: {error.strerror}") from error

    def adopt(self, upload: Upload | LinkedInput, spec: JobSpec) -> JobFolder:
        """Makes a job of a finished upload: from the rename on it exists, and survives a power cut.

        Raises ResourceError.
        """
        try:
            spec.save(upload.folder.spec)
            self._share(upload.folder.paths.input, self._inputs / f"{spec.input_sha256}.jsonl")
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"the job cannot be stored: {error.strerror}") from error
        folder = self.folder(spec.id)
        upload.folder.path.rename(folder.path)
        sync_directory(self._jobs)
        return folder

    def folder(self, job_id: str) -> JobFolder:
        """Where a job is."""
        return JobFolder(self._jobs / job_id)

    def load(self) -> Loaded:
        """All jobs, oldest first. One that cannot be understood keeps nobody from the others."""
        found = Loaded([], [], [])
        for path in sorted(self._jobs.iterdir()):
            try:
                loaded = JobSpec.load(path / "job.json")
            except JobCorruptError as error:
                found.unreadable.append(error.message)
                continue
            if loaded is not None:
                spec, mended = loaded
                found.specs.append(spec)
                found.mended.extend([spec.id] if mended else [])
        return found

    def delete(self, job_id: str, input_sha256: str) -> None:
        """Removes a job: the spec first, so that what a crash leaves is no job. The input goes with its last job."""
        folder = self.folder(job_id)
        remove_twice(folder.spec)
        shutil.rmtree(folder.path, ignore_errors=True)
        _remove_if_unused(self._inputs / f"{input_sha256}.jsonl")

    def _share(self, own: Path, shared: Path) -> None:
        """Makes inputs of equal content one file."""
        try:
            if shared.exists() and shared.samefile(own):
                return  # renaming one name of a file to another of it does nothing, and leaves both
            if shared.exists() and shared.stat().st_size == own.stat().st_size:
                link = own.with_name(own.name + ".link")
                link.hardlink_to(shared)
                link.replace(own)
            else:
                shared.unlink(missing_ok=True)
                shared.hardlink_to(own)
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
                raise
            log.warning("%s keeps a copy of its own: %s", own, error.strerror)  # no links here, or too many


def _remove_if_unused(shared: Path) -> None:
    """The file system counts who refers to an input."""
    with contextlib.suppress(FileNotFoundError):
        if shared.stat().st_nlink == 1:
            shared.unlink()
