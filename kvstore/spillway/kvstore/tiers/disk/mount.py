"""Who may use how much of a disk directory.

One budget belongs to the directory, whatever number of processes use it: it is cut into as many equal **shares** as the
configuration names sharers, and a store holds one share, under a file lock that the kernel lifts when the process dies.

    directory/mount.json          the budget and the number of sharers that living stores agree on
    directory/mount.lock          held while shares are handed out
    directory/share-00/owner.lock held for as long as a store lives; names its process
    directory/share-00/share.json whose blocks they were last, and the generation
    directory/share-00/segment-000000.kv …
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from ...errors import ConfigError, MountBusyError, MountError, MountMismatchError
from ...identity import KVIdentity

_log = logging.getLogger(__name__)

_Books = TypeVar("_Books", bound=msgspec.Struct)

_SHARE_RESERVE_BYTES = 64 << 10
"""Kept back per share for its books, locks and directories."""


class MountBooks(msgspec.Struct, frozen=True):
    """``mount.json``."""

    budget_bytes: int
    sharers: int


class ShareBooks(msgspec.Struct, frozen=True):
    """``share.json``: readable, so that a person can tell whose blocks a directory holds."""

    generation: int
    identity_digest: str
    weights_digest: str = ""
    kv_dtype: str = ""
    tensor_rank: int = 0
    tensor_size: int = 1


@dataclass(frozen=True, slots=True)
class Share:
    """A share that this process holds. ``generation`` is higher than any that wrote to it before."""

    directory: Path
    budget_bytes: int
    generation: int
    lock: int

    def segment_paths(self) -> list[Path]:
        """Segment files, oldest first."""
        return sorted(self.directory.glob("segment-*.kv"))

    def next_segment_path(self) -> Path:
        """A name that no segment has."""
        paths = self.segment_paths()
        number = int(paths[-1].stem.removeprefix("segment-")) + 1 if paths else 0
        return self.directory / f"segment-{number:06d}.kv"

    def allocated_bytes(self) -> int:
        """Bytes of all segment files, allocated or promised, whichever is more."""
        return sum(self.file_bytes().values())

    def file_bytes(self) -> dict[Path, int]:
        """The same of each file."""
        while True:
            try:
                statuses = {path: path.stat() for path in self.directory.glob("segment-*")}
            except FileNotFoundError:
                continue  # a segment was finished or removed meanwhile: look again
            return {path: max(status.st_blocks * 512, status.st_size) for path, status in statuses.items()}

    def release(self) -> None:
        """Let another store have the share."""
        os.close(self.lock)


def open_share(directory: Path, budget_bytes: int, sharers: int, identity: KVIdentity) -> Share:
    """Take a share of ``directory``: the one that held this identity last, else a fresh one, else the longest unused.

    Raises `MountBusyError` if living stores hold all shares, `MountMismatchError` if they run under another budget or
    number of sharers, `MountError` if the directory cannot be used.
    """
    share_budget = budget_bytes // sharers - _SHARE_RESERVE_BYTES
    if share_budget <= 0:
        raise ConfigError(f"a disk budget of {budget_bytes} bytes for {sharers} sharers leaves nothing for blocks")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _mount_lock(directory):
            return _open_locked(directory, MountBooks(budget_bytes, sharers), share_budget, identity)
    except OSError as error:
        raise MountError(f"cannot use {directory} for blocks: {error}") from error


@contextmanager
def claimed(directory: Path, path: Path) -> Iterator[bool]:
    """Keep stores from opening the share at ``path`` while the context lasts; False if a living store has it.

    Raises OSError.
    """
    with _mount_lock(directory):
        lock = os.open(path / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
    try:
        if free:
            _name_owner(lock)
        yield free
    finally:
        os.close(lock)


def look_at_shares(directory: Path) -> list[tuple[Path, str, ShareBooks | None]]:
    """Every share that ``directory`` has: where it is, who holds it (empty if nobody), whose blocks it has.

    Changes nothing, and holds back no store that is just being opened. Raises OSError.
    """
    found = []
    with _mount_lock(directory):
        for path in sorted(directory.glob("share-[0-9][0-9]")):
            holder = ""
            lock = os.open(path / "owner.lock", os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(lock, 64, 0).decode(errors="replace").strip() or "a process"
            finally:
                os.close(lock)
            found.append((path, holder, _read(path / "share.json", ShareBooks)))
    return found


def _open_locked(directory: Path, books: MountBooks, share_budget: int, identity: KVIdentity) -> Share:
    locks, holders = _lock_free_shares(directory, books.sharers)
    try:
        _agree(directory, books, holders)
        if not locks:
            raise MountBusyError(
                f"all {books.sharers} shares of {directory} are in use by {', '.join(sorted(holders.values()))}; raise "
                "disk_sharers for more stores on one directory, or give this one its own"
            )
        for extra in directory.glob("share-[0-9][0-9]"):
            if extra not in locks and extra not in holders:
                shutil.rmtree(extra)
        for path in locks:
            _shrink(path, share_budget)
        chosen = min(locks, key=lambda path: _preference(path, identity))
        lock = locks.pop(chosen)
    finally:
        for descriptor in locks.values():
            os.close(descriptor)
    try:
        _name_owner(lock)
        known = _read(chosen / "share.json", ShareBooks)
        generation = (known.generation if known else 0) + 1
        _write_unless_full(
            chosen / "share.json",
            ShareBooks(
                generation,
                identity.digest().hex(),
                identity.weights_digest,
                identity.kv_dtype,
                identity.tensor_rank,
                identity.tensor_size,
            ),
        )
    except BaseException:
        os.close(lock)
        raise
    return Share(chosen, share_budget, generation, lock)


def _lock_free_shares(directory: Path, sharers: int) -> tuple[dict[Path, int], dict[Path, str]]:
    """Lock every share that nobody holds; the locks, and who holds each other share."""
    wanted = {directory / f"share-{number:02d}" for number in range(sharers)}
    locks: dict[Path, int] = {}
    holders: dict[Path, str] = {}
    for path in sorted(wanted | set(directory.glob("share-[0-9][0-9]"))):
        path.mkdir(exist_ok=True)
        descriptor = os.open(path / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holders[path] = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "a process"
            os.close(descriptor)
        else:
            if path in wanted:
                locks[path] = descriptor
            else:
                os.close(descriptor)
    return locks, holders


def _agree(directory: Path, books: MountBooks, holders: dict[Path, str]) -> None:
    known = _read(directory / "mount.json", MountBooks)
    if known == books:
        return
    if known is not None and holders:
        raise MountMismatchError(
            f"{directory} is in use with a budget of {known.budget_bytes} bytes for {known.sharers} sharers, "
            f"not {books.budget_bytes} for {books.sharers}"
        )
    _write(directory / "mount.json", books)


def _preference(path: Path, identity: KVIdentity) -> tuple[int, float]:
    known = _read(path / "share.json", ShareBooks)
    if known is None:
        return (1, 0.0)
    if known.identity_digest == identity.digest().hex():
        return (0, 0.0)
    return (2, (path / "share.json").stat().st_mtime)


def _shrink(path: Path, budget_bytes: int) -> None:
    """Delete unfinished files, then the newest segments until the rest is within budget."""
    for unfinished in path.glob("segment-*.new"):
        unfinished.unlink()
    segments = sorted(path.glob("segment-*.kv"))
    total = sum(segment.stat().st_size for segment in segments)
    while total > budget_bytes:
        last = segments.pop()
        total -= last.stat().st_size
        last.unlink()


@contextmanager
def _mount_lock(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / "mount.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path, kind: type[_Books]) -> _Books | None:
    """The books in ``path``; None if there are none, or what there is was torn: they can be rebuilt."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _name_owner(lock: int) -> None:
    """Say in the lock's file whose it is, for people; on a full disk it names the one before."""
    try:
        os.pwrite(lock, f"process {os.getpid()}".encode().ljust(32), 0)
    except OSError as error:
        _tolerate_full(error, "owner.lock")


def _write_unless_full(path: Path, books: ShareBooks) -> None:
    """A full disk must not keep a store from opening: generations are also found in the headers, blocks say whose."""
    try:
        _write(path, books)
    except OSError as error:
        _tolerate_full(error, path)
        path.with_suffix(".tmp").unlink(missing_ok=True)


def _tolerate_full(error: OSError, what: object) -> None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    _log.warning("%s was not written anew: the disk is full", what)


def _write(path: Path, books: msgspec.Struct) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(books))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
