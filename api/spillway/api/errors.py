"""Everything that can be wrong with a job, as values and as exceptions.

Two kinds, never mixed. A `LineError` is about one line: a value that ends up in the error file while the job goes on.
A `SpillwayError` is about the whole job or command: an exception that says what happened and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path


class ErrorCode(StrEnum):
    """Codes of the error file. A code never changes its meaning; programs may match on it."""

    INVALID_JSON = "invalid_json"
    """Not one well-formed JSON object in UTF-8: syntax, encoding, a repeated key, nesting too deep."""
    LINE_TOO_LONG = "line_too_long"
    INVALID_REQUEST = "invalid_request"
    """The envelope (custom_id, method, url) is wrong; the body was not looked at."""
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    MISSING_PARAMETER = "missing_parameter"
    UNKNOWN_PARAMETER = "unknown_parameter"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"
    """A real parameter of the API that Spillway does not offer (or not with this value)."""
    INVALID_PARAMETER = "invalid_parameter"
    """Wrong type, out of range, not finite, or at odds with another parameter."""
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    KV_CAPACITY_EXCEEDED = "kv_capacity_exceeded"
    """The sequence can never fit the device pool, however much is spilled."""
    CHAT_TEMPLATE_FAILED = "chat_template_failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    INTERNAL = "internal_error"


MAX_MESSAGE_CHARS = 500
"""Longer messages are cut: an error file must not grow with what people put into a line."""


@dataclass(frozen=True, slots=True)
class LineError:
    """Why one line has no result. `line` counts from 1 over all lines of the file, blank ones included.

    `custom_id` is what the line called itself if that much could be read, else None. `param` is the path of the field
    at fault, such as `messages[0].content`, or None.
    """

    code: ErrorCode
    message: str
    line: int
    param: str | None = None
    custom_id: str | None = None

    def __post_init__(self) -> None:
        if len(self.message) > MAX_MESSAGE_CHARS:
            object.__setattr__(self, "message", self.message[: MAX_MESSAGE_CHARS - 1] + "…")

    def with_custom_id(self, custom_id: str | None) -> LineError:
        """The same error, tied to the line's own name."""
        return replace(self, custom_id=custom_id)


class SpillwayError(Exception):
    """Root of all exceptions raised on purpose: `message` says what happened, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class JobError(SpillwayError):
    """A job cannot be opened, continued or sealed."""


class InputError(JobError):
    """The input file is missing, unreadable, not a regular file, or holds no request line."""


class InputChangedError(JobError):
    """The input file changed while its job was running."""


class OutputPathError(JobError):
    """The output or error file cannot be written where it was asked for."""


class OutputExistsError(OutputPathError):
    """The output or error file exists and is not the work of this job."""


class JobChangedError(JobError):
    """A job directory exists, but for another input or other options: continuing would mix two jobs."""

    def __init__(self, directory: Path, differences: tuple[str, ...]) -> None:
        super().__init__(
            f"{directory} holds an unfinished or finished job that differs from this one: {'; '.join(differences)}",
            "Run with the former input and options to continue it, choose another output, "
            "or pass --restart to throw its results away and start over.",
        )
        self.directory = directory
        self.differences = differences


class JobLockedError(JobError):
    """Another process is running this job."""

    def __init__(self, directory: Path, pid: int | None) -> None:
        who = f"process {pid}" if pid is not None else "another process"
        super().__init__(
            f"{who} is already running the job in {directory}", "Wait for it, or stop it and run again to resume."
        )
        self.directory = directory
        self.pid = pid


class JobCorruptError(JobError):
    """The job directory cannot be understood (its manifest, not single results: those simply run again)."""


class StorageError(JobError):
    """Results cannot be written: the disk is full, or failing."""


class DirectoryLostError(StorageError):
    """The data directory is not this gateway's any more: nothing may be written to it."""
