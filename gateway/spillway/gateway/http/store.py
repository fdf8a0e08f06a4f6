"""Uploaded files on disk. The folder is all there is: no index, so nothing to be out of step with.

<data>/files/<tenant>/<id>/file.json     what it is: a folder without one does not exist here
                           input.jsonl   as uploaded; a job made from it has a second name (hard link) of its own
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import msgspec

from spillway.gateway.durable import replacing, sync_directory
from spillway.gateway.service.errors import NotFoundError, Reason, ResourceError
from spillway.gateway.service.store import JobFolder, Upload

_ID = re.compile(r"[0-9a-f]{28}")


class FileSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file `file.json`. Times in Unix seconds."""

    filename: str
    sha256: str
    size_bytes: int
    num_lines: int
    created_s: float
    expires_s: float | None = None


class FileStore:
    """Inputs of all tenants. Blocking; safe from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def adopt(self, tenant: str, upload: Upload, spec: FileSpec) -> None:
        """Keeps a finished upload under its id: from the rename on it exists, and survives a power cut.

        Raises ResourceError.
        """
        target = self._folder / tenant / upload.id
        try:
            with replacing(upload.folder.path / "file.json") as file:
                file.write(msgspec.json.encode(spec))
            target.parent.mkdir(parents=True, exist_ok=True)
            upload.folder.path.rename(target)
            sync_directory(target.parent)
            sync_directory(self._folder)
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"the file cannot be stored: {error.strerror}") from error

    def ids(self, tenant: str) -> list[str]:
        """Ids of a tenant's files, oldest first."""
        folder = self._folder / tenant
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return sorted(name for name in names if _ID.fullmatch(name))

    def contents(self, tenant: str) -> dict[str, int]:
        """Sizes of what a tenant's files hold, by digest: equal ones once."""
        found = {}
        for file_id in self.ids(tenant):
            spec = None
            with contextlib.suppress(ResourceError):  # the sweep tells of it
                spec = self._spec(tenant, file_id)
            if spec is not None:
                found[spec.sha256] = spec.size_bytes
        return found

    def get(self, tenant: str, file_id: str, now_s: float) -> tuple[FileSpec, Path]:
        """A file and where its content is. Raises NotFoundError: another tenant's, or one past its time, is none."""
        spec = self._spec(tenant, file_id) if _ID.fullmatch(file_id) else None
        if spec is None:
            raise NotFoundError(Reason.FILE_NOT_FOUND, f"there is no file file-{file_id[:100]}")
        if spec.expires_s is not None and spec.expires_s <= now_s:
            raise NotFoundError(Reason.FILE_NOT_FOUND, f"file file-{file_id} has expired")
        return spec, JobFolder(self._folder / tenant / file_id).paths.input

    def delete(self, tenant: str, file_id: str) -> None:
        """Removes a file that `get` found; jobs made from it keep their input. What a crash leaves is no file."""
        path = self._folder / tenant / file_id
        try:
            (path / "file.json").unlink(missing_ok=True)
            shutil.rmtree(path)
            sync_directory(path.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ResourceError(Reason.STORAGE, f"file-{file_id} cannot be removed: {error.strerror}") from error

    def sweep(self, now_s: float) -> list[str]:
        """Removes files past their time, and what crashes left of others; digests of those. Raises ResourceError."""
        gone = []
        for tenant in self._folder.iterdir() if self._folder.exists() else ():
            for file_id in self.ids(tenant.name):
                spec = self._spec(tenant.name, file_id)
                if spec is None or (spec.expires_s is not None and spec.expires_s <= now_s):
                    self.delete(tenant.name, file_id)
                    gone += [] if spec is None else [spec.sha256]
        return gone

    def _spec(self, tenant: str, file_id: str) -> FileSpec | None:
        """None if there is no such file. Raises ResourceError."""
        try:
            content = (self._folder / tenant / file_id / "file.json").read_bytes()
            return msgspec.json.decode(content, type=FileSpec)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ResourceError(Reason.STORAGE, f"file file-{file_id} cannot be read: {error}") from error
