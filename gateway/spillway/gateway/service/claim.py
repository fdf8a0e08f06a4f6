"""Who has a data directory: one gateway at a time, by a lock of the kernel; and where that one is reached.

<data>/lock         held as long as its owner lives, however that ends
<data>/owner.json   who that is: the first thing that an owner writes

The directory is what must not be written by two, so it decides who writes, and nothing beside it can be lost or say
otherwise. Between machines it takes a file system whose locks hold between machines, such as NFSv4 or CephFS.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec

from spillway.api.errors import DirectoryLostError, OutputPathError, StorageError
from spillway.gateway.durable import replacing, sync_directory
from spillway.gateway.paths import JobLock

_OWNER, _HOUSE_TOKEN = "owner.json", "house-token"
_TOKEN_CHARS = 32


@dataclass(frozen=True, slots=True)
class Place:
    """Where other gateways reach one, each "host:port"; empty: not at all."""

    grpc: str = ""
    http: str = ""


class Owner(msgspec.Struct, frozen=True):
    """The whole file `owner.json`. `generation` goes up by one with each owner; `id` is nobody else's."""

    id: str
    generation: int
    grpc: str
    http: str

    @classmethod
    def read(cls, data: Path) -> Owner | None:
        """Who has the directory, or had it last; None if that cannot be told. Raises OSError."""
        try:
            return msgspec.json.decode((data / _OWNER).read_bytes(), type=cls)
        except (FileNotFoundError, ValueError):
            return None


class Claim:
    """The hold on a data directory."""

    def __init__(self, data: Path, place: Place | None = None) -> None:
        """Raises JobLockedError if another gateway has it, OutputPathError or StorageError if it cannot be used."""
        try:
            data.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputPathError(f"cannot create {data}: {error.strerror}", "Check the path.") from error
        self.data = data
        self._lock = JobLock(data)
        try:
            former, place = Owner.read(data), place or Place()
            generation = 1 if former is None else former.generation + 1
            self.owner = Owner(secrets.token_hex(8), generation, place.grpc, place.http)
            self._write()
        except OSError as error:
            self._lock.release()
            raise StorageError(f"{data} cannot be taken: {error.strerror}", "Check the disk.") from error

    def check(self) -> None:
        """Raises DirectoryLostError unless nobody else has had the directory since it was taken.

        The lock alone would not tell: a file server that was away may give it back after another had it.
        """
        if not self._lock.held():  # first: from here on nobody can take it unseen
            raise DirectoryLostError(f"the lock of {self.data} is lost")
        try:
            theirs = Owner.read(self.data)
        except OSError as error:
            raise DirectoryLostError(f"{self.data} cannot be read any more: {error.strerror}") from error
        if theirs is None:
            raise DirectoryLostError(f"{self.data} does not say any more whose it is")
        if theirs.id != self.owner.id:
            raise DirectoryLostError(f"the gateway at {theirs.grpc} has taken {self.data}")

    def move(self, place: Place) -> None:
        """Says in the directory that its owner is reached elsewhere. Raises DirectoryLostError, StorageError."""
        self.check()
        self.owner = msgspec.structs.replace(self.owner, grpc=place.grpc, http=place.http)
        try:
            self._write()
        except OSError as error:
            raise StorageError(f"{self.data} cannot be written: {error.strerror}", "Check the disk.") from error

    def release(self) -> None:
        """Lets go of the directory. Safe to call twice."""
        self._lock.release()

    def _write(self) -> None:
        with replacing(self.data / _OWNER) as file:
            file.write(msgspec.json.encode(self.owner))


def house_token(data: Path) -> str:
    """The bearer token of gateways' own agents: made once for a directory, readable for its user alone.

    Any gateway over the directory knows it, so an agent of one is known to whichever owns the jobs. Raises OSError,
    StorageError.
    """
    data.mkdir(parents=True, exist_ok=True)
    path = data / _HOUSE_TOKEN
    if not path.exists():
        draft = path.with_name(f"{_HOUSE_TOKEN}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another gateway was faster: its token counts
                path.hardlink_to(draft)
        finally:
            draft.unlink(missing_ok=True)
        sync_directory(data)
    token = path.read_text()
    if len(token) < _TOKEN_CHARS:  # an empty one would let everybody in
        raise StorageError(f"{path} is damaged", "Remove it and restart the gateways.")
    return token
