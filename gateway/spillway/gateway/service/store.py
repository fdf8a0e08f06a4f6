"""Jobs on disk.

<data>/lock                       one gateway at a time
<data>/incoming/<id>/             uploads under way; what a stopped gateway left here is thrown away
<data>/jobs/<id>/job.json         the spec: a folder without one does not exist here
                 input.jsonl      as uploaded
                 output.jsonl     sealed results
                 errors.jsonl     sealed errors
                 output.jsonl.spillway/   the job directory of `spillway.gateway.job`
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from spillway.gateway.durable import sync_directory
from spillway.gateway.paths import JobLock, JobPaths
from spillway.gateway.service.errors import Reason, ResourceError
from spillway.gateway.service.spec import JobSpec, new_job_id


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

    @property
    def sha256(self) -> str:
        """Digest of what was written so far, in hex."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Takes in the next piece. Raises ResourceError if the input grows over the limit or the disk is full."""
        self.size_bytes += len(data)
        if self.size_bytes > self._max_bytes:
            raise ResourceError(Reason.INPUT_TOO_LARGE, f"the input is larger than {self._max_bytes} bytes")
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


class JobStore:
    """The data directory, held exclusively."""

    def __init__(self, data: Path) -> None:
        """Raises JobLockedError if another gateway has it, OutputPathError or StorageError if it cannot be used."""
        data.mkdir(parents=True, exist_ok=True)
        self._lock = JobLock(data)
        self._incoming, self._jobs = data / "incoming", data / "jobs"
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._jobs.mkdir(exist_ok=True)

    def close(self) -> None:
        """Lets go of the directory."""
        self._lock.release()

    def upload(self, max_bytes: int) -> Upload:
        """Begins an upload."""
        return Upload(self._incoming / new_job_id(), max_bytes)

    def adopt(self, upload: Upload, spec: JobSpec) -> JobFolder:
        """Makes a job of a finished upload: from the rename on it exists, and survives a power cut."""
        spec.save(upload.folder.spec)
        folder = self.folder(spec.id)
        upload.folder.path.rename(folder.path)
        sync_directory(self._jobs)
        return folder

    def folder(self, job_id: str) -> JobFolder:
        """Where a job is."""
        return JobFolder(self._jobs / job_id)

    def load(self) -> list[JobSpec]:
        """All jobs, oldest first. Raises JobCorruptError for one whose spec cannot be understood."""
        folders = sorted(path for path in self._jobs.iterdir() if (path / "job.json").exists())
        return [JobSpec.load(path / "job.json") for path in folders]

    def delete(self, job_id: str) -> None:
        """Removes a job: the spec first, so that what a crash leaves is no job."""
        folder = self.folder(job_id)
        folder.spec.unlink(missing_ok=True)
        sync_directory(folder.path)
        shutil.rmtree(folder.path, ignore_errors=True)
