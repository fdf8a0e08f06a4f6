"""What a tenant sees as files: what it uploaded, and what its jobs wrote (found in the jobs' folders)."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from spillway.gateway.http.store import FileStore
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.errors import ConflictError, NotFoundError, Reason
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.store import StoredInput

_ID = re.compile(r"file-([0-9a-f]{1,64})(?:-(input|output|errors))?")


class Purpose(StrEnum):
    """What a file is for, in OpenAI's words."""

    BATCH = "batch"
    OUTPUT = "batch_output"


class Part(StrEnum):
    """The files of a job."""

    INPUT = "input"
    OUTPUT = "output"
    ERRORS = "errors"


@dataclass(frozen=True, slots=True)
class ShelfFile:
    """A file as clients see it. Times in Unix seconds. `content` is what a job can be made of: uploads alone."""

    id: str
    filename: str
    purpose: Purpose
    size_bytes: int
    created_s: float
    path: Path
    expires_s: float | None = None
    content: StoredInput | None = None


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which stretch of a list is wanted: at most `limit` after the one with the id `after` (empty: from the start)."""

    limit: int
    after: str = ""
    ascending: bool = False


def part_id(job: ServedJob, part: Part) -> str:
    """The id of one of a job's files."""
    return f"file-{job.spec.id}-{part}"


def page_of(keys: list[tuple[float, str]], query: PageQuery) -> tuple[list[str], bool]:
    """The ids of a stretch of a list, and whether there are more; `keys` are (creation, id) of all.

    Raises NotFoundError if there is no `after` among them.
    """
    ordered = sorted(keys, reverse=not query.ascending)
    start = 0
    if query.after:
        places = [place for place, (_, name) in enumerate(ordered) if name == query.after]
        if not places:
            raise NotFoundError(Reason.FILE_NOT_FOUND, f"there is no {query.after[:100]} to go on after")
        start = places[0] + 1
    return [name for _, name in ordered[start : start + query.limit]], len(ordered) > start + query.limit


class Shelf:
    """Files of all tenants. For the event loop's thread: jobs live there; what may take long is done in others."""

    def __init__(self, ownership: Ownership, store: FileStore) -> None:
        self._ownership, self._store = ownership, store

    @property
    def _coordinator(self) -> Coordinator:
        return self._ownership.coordinator

    def get(self, tenant: str, file_id: str) -> ShelfFile:
        """Raises NotFoundError, ResourceError, DamagedError."""
        name, part = _parsed(file_id)
        return self._uploaded(tenant, name) if part is None else self._of_job(tenant, name, part)

    async def page(self, tenant: str, purpose: str, query: PageQuery) -> tuple[list[ShelfFile], bool]:
        """A stretch of a tenant's files, of one purpose or (empty) of all. Raises NotFoundError."""
        uploads = await asyncio.to_thread(self._store.ids, tenant) if purpose in ("", Purpose.BATCH) else []
        keys = [(int(name[:12], 16) / 1000, f"file-{name}") for name in uploads]  # ids begin with their time
        keys += self._outputs(tenant) if purpose in ("", Purpose.OUTPUT) else []
        ids, more = page_of(keys, query)
        uploaded = [name for name, part in map(_parsed, ids) if part is None]
        found = {file.id: file for file in await asyncio.to_thread(self._all_uploaded, tenant, uploaded)}
        for file_id in ids:
            name, part = _parsed(file_id)
            if part is not None:
                with contextlib.suppress(NotFoundError):  # the client had it removed
                    found[file_id] = self._of_job(tenant, name, part)
        return [found[file_id] for file_id in ids if file_id in found], more

    async def delete(self, tenant: str, file_id: str) -> None:
        """Removes a file. Of a job's files, only those that it wrote. Raises NotFoundError, ConflictError."""
        file = self.get(tenant, file_id)
        name, part = _parsed(file_id)
        if part is Part.INPUT:
            raise ConflictError(Reason.FILE_IN_USE, f"{file_id} is the input of batch_{name}", "Delete the job.")
        if part is not None:
            self._coordinator.get(name, tenant).discard(file.path)
            return
        await asyncio.to_thread(self._store.delete, tenant, name)
        assert file.content is not None
        await self._coordinator.unlinked(file.content.sha256)

    def _outputs(self, tenant: str) -> Iterator[tuple[float, str]]:
        for job in self._coordinator.jobs(tenant):
            if job.spec.outcome is not None:
                yield job.spec.outcome.end_s, part_id(job, Part.OUTPUT)
                if job.counts().failed:
                    yield job.spec.outcome.end_s, part_id(job, Part.ERRORS)

    def _uploaded(self, tenant: str, name: str) -> ShelfFile:
        """Safe from any thread."""
        spec, path = self._store.get(tenant, name, time.time())
        content = StoredInput(path, spec.sha256, spec.size_bytes, spec.num_lines)
        return ShelfFile(
            f"file-{name}",
            spec.filename,
            Purpose.BATCH,
            spec.size_bytes,
            spec.created_s,
            path,
            spec.expires_s,
            content,
        )

    def _all_uploaded(self, tenant: str, names: list[str]) -> list[ShelfFile]:
        files = []
        for name in names:
            with contextlib.suppress(NotFoundError):  # deleted meanwhile, or past its time
                files.append(self._uploaded(tenant, name))
        return files

    def _of_job(self, tenant: str, job_id: str, part: Part) -> ShelfFile:
        file_id = f"file-{job_id}-{part}"
        try:
            job = self._coordinator.get(job_id, tenant)
            size_bytes = _path(job, part).stat().st_size
        except (NotFoundError, FileNotFoundError):
            raise NotFoundError(Reason.FILE_NOT_FOUND, f"there is no file {file_id[:100]}") from None
        if part is Part.INPUT:
            name = f"batch_{job_id}_input.jsonl"
            return ShelfFile(file_id, name, Purpose.BATCH, size_bytes, job.spec.created_s, _path(job, part))
        if job.spec.outcome is None:  # written, but the job does not say so yet
            raise NotFoundError(Reason.FILE_NOT_FOUND, f"there is no file {file_id[:100]} yet")
        if job.spec.files_expired(time.time()):
            raise NotFoundError(Reason.FILE_NOT_FOUND, f"file {file_id[:100]} has expired")
        job.whole_file(_path(job, part))
        name, made_s = f"batch_{job_id}_{part}.jsonl", job.spec.outcome.end_s
        return ShelfFile(file_id, name, Purpose.OUTPUT, size_bytes, made_s, _path(job, part), job.spec.files_expire_s)


def _parsed(file_id: str) -> tuple[str, Part | None]:
    """The upload's or job's id in a file's, and which of the job's files it is. Raises NotFoundError."""
    match = _ID.fullmatch(file_id)
    if match is None:
        raise NotFoundError(Reason.FILE_NOT_FOUND, f"there is no file {file_id[:100]}")
    return match[1], None if match[2] is None else Part(match[2])


def _path(job: ServedJob, part: Part) -> Path:
    paths = job.folder.paths
    return {Part.INPUT: paths.input, Part.OUTPUT: paths.output, Part.ERRORS: paths.errors}[part]
