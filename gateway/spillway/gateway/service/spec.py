"""What a client asked for, and what became of it: the small file that makes a job of an input."""

from __future__ import annotations

import secrets
import time
from enum import StrEnum
from pathlib import Path

import msgspec

from spillway.api.errors import JobCorruptError
from spillway.gateway.durable import read_twice, write_twice
from spillway.gateway.options import JobOptions
from spillway.gateway.service.errors import InvalidError

MAX_LABELS = 16
MAX_PRIORITY = 100
MAX_NAME_CHARS = 200
MAX_TIME_S = 253_402_300_799.0
"""The last second that a google.protobuf.Timestamp can hold."""


class Wish(StrEnum):
    """What is to happen with a job. Everything but PAUSE and RUN is for good."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"
    EXPIRE = "expire"


class End(StrEnum):
    """How a job ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"


class BatchOrigin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a job that came through OpenAI's API was made from. `window`: as it was asked for.

    `expires_after_s`: its output files are kept for so long; None: as long as the job.
    """

    input_file: str
    endpoint: str
    window: str
    expires_after_s: int | None = None


class JobRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The client's part. `deadline_s` is in Unix seconds; `request_id` is empty if the client gave none.

    Lines of a job with a `batch` must name its endpoint and the job's model; those of others may name any.
    """

    model: str
    display_name: str = ""
    labels: dict[str, str] = {}
    priority: int = 0
    deadline_s: float | None = None
    request_id: str = ""
    batch: BatchOrigin | None = None

    def options(self) -> JobOptions:
        """How its job is opened."""
        url, model = ("", "") if self.batch is None else (self.batch.endpoint, self.model)
        return JobOptions(self.model, "as deployed", only_url=url, only_model=model)

    def check(self) -> None:
        """Raises InvalidError for what a job cannot be."""
        if not 1 <= len(self.model) <= 256:
            raise InvalidError("model must have 1 to 256 characters")
        if len(self.display_name) > MAX_NAME_CHARS:
            raise InvalidError(f"display_name must have at most {MAX_NAME_CHARS} characters")
        if len(self.labels) > MAX_LABELS:
            raise InvalidError(f"at most {MAX_LABELS} labels")
        if any(not 1 <= len(key) <= 64 or len(value) > 512 for key, value in self.labels.items()):
            raise InvalidError("labels need keys of 1 to 64 and values of at most 512 characters")
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise InvalidError(f"priority must lie in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
        if self.deadline_s is not None and not 0 < self.deadline_s <= MAX_TIME_S:
            raise InvalidError("deadline must lie in the years 1970 to 9999")
        if len(self.request_id) > 128:
            raise InvalidError("request_id must have at most 128 characters")


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of a job. `message` says why it FAILED."""

    end: End
    end_s: float
    message: str = ""
    finalizing_s: float | None = None
    """When the files began to be written, if that is known."""


class TraceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The span of a job, and that of whoever submitted it (empty: of nobody), as `traceparent`."""

    span: str
    parent: str = ""


class JobSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file, `job.json`."""

    id: str
    request: JobRequest
    input_sha256: str
    input_bytes: int
    input_lines: int
    """At least as many as there are requests: blank lines count."""
    created_s: float
    tenant: str = "default"
    wish: Wish = Wish.RUN
    wish_s: float | None = None
    """When that was wished, if it is not what it began with."""
    outcome: Outcome | None = None
    discarded: bool = False
    """The client had a file of results removed: that it is not there is no damage."""
    trace: TraceRecord | None = None
    """Where its spans belong; None: it is not traced."""

    @property
    def began_s(self) -> float:
        """When the call began that submitted it, in Unix seconds: ids tell (see `new_job_id`)."""
        return int(self.id[:12], 16) / 1000

    @property
    def files_expire_s(self) -> float | None:
        """Until when the files are kept that it wrote, in Unix seconds; None: as long as the job."""
        batch = self.request.batch
        if batch is None or batch.expires_after_s is None or self.outcome is None:
            return None
        return self.outcome.end_s + batch.expires_after_s

    def files_expired(self, now_s: float) -> bool:
        """Whether they are past that time."""
        return self.files_expire_s is not None and self.files_expire_s <= now_s

    def save(self, path: Path) -> None:
        """Writes it durably, and a copy beside it."""
        write_twice(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def load(cls, path: Path) -> tuple[JobSpec, bool] | None:
        """The spec, and whether it was torn and had to be mended; None if there is none. Raises JobCorruptError."""
        try:
            return read_twice(path, msgspec.json.Decoder(cls).decode)
        except (OSError, ValueError) as error:
            raise JobCorruptError(f"{path} cannot be understood: {error}", "Move the job's folder away.") from error


def new_job_id() -> str:
    """An id that sorts by time of creation and cannot be guessed."""
    return f"{int(time.time() * 1000):012x}{secrets.token_hex(8)}"
