"""The readable memory of a job: which input, which options, and how far it came."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from spillway.api.errors import JobCorruptError
from spillway.gateway.durable import read_twice, write_twice
from spillway.gateway.options import JobOptions, Scalar

VERSION: Literal[2] = 2


class InputRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The input as it was taken in; digest is SHA-256 in hex."""

    path: str
    size_bytes: int
    sha256: str


class SealedRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished job: how many lines ended how, and the size of what was written (None: no error file was needed)."""

    completed: int
    failed: int
    output_bytes: int
    error_bytes: int | None
    errors_by_code: dict[str, int]
    prompt_tokens: int
    completion_tokens: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The job directory's `manifest.json`. Written once intake is done, and once more when the job is sealed."""

    version: Literal[2]
    created: int
    """Unix seconds; the `created` of every result, so that a resumed job writes the same bytes."""
    log_key: int
    input: InputRecord
    options: dict[str, Scalar]
    num_lines: int
    sealed: SealedRecord | None = None

    def digest(self) -> bytes:
        """32 bytes that name the job: same input content and options, same digest. Result ids follow from it."""
        return hashlib.sha256(msgspec.json.encode([self.input.sha256, sorted(self.options.items())])).digest()

    def save(self, path: Path) -> None:
        """Writes it durably in place of the former one, and a copy beside it."""
        write_twice(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def load(cls, path: Path) -> tuple[Manifest, bool] | None:
        """The manifest, and whether it was torn and had to be mended; or None if there is none yet.

        Raises JobCorruptError.
        """
        try:
            return read_twice(path, msgspec.json.Decoder(cls).decode)
        except ValueError as error:
            raise JobCorruptError(
                f"{path} cannot be understood: {error}",
                "It may be of another version of Spillway. Pass --restart to start the job over.",
            ) from error


def differences(former: Manifest, sha256: str, options: JobOptions) -> tuple[str, ...]:
    """What changed between a job and the run that wants to go on with it, in words; empty if nothing did."""
    changes = []
    if former.input.sha256 != sha256:
        changes.append("the input has other content")
    before, now = former.options, options.identity()
    for name in sorted(before.keys() | now.keys()):
        if name not in before or name not in now or before[name] != now[name]:
            changes.append(f"{name} was {before.get(name, 'not set')!r} and is {now.get(name, 'not set')!r}")
    return tuple(changes)
