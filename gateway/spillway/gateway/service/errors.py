"""What the service refuses, with a reason that programs may match on."""

from __future__ import annotations

from enum import StrEnum

from spillway.api.errors import SpillwayError


class Reason(StrEnum):
    """Reasons in a google.rpc.ErrorInfo of domain `spillway.dev`. A reason never changes its meaning."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    FILE_NOT_FOUND = "FILE_NOT_FOUND"
    RANGE_NOT_SATISFIABLE = "RANGE_NOT_SATISFIABLE"
    TIMEOUT = "TIMEOUT"
    FILE_IN_USE = "FILE_IN_USE"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    JOB_NOT_FINAL = "JOB_NOT_FINAL"
    JOB_FINAL = "JOB_FINAL"
    INPUT_NOT_FOUND = "INPUT_NOT_FOUND"
    INPUT_UNREADABLE = "INPUT_UNREADABLE"
    NO_ERRORS = "NO_ERRORS"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    INPUT_TOO_LARGE = "INPUT_TOO_LARGE"
    BAD_RESULT = "BAD_RESULT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    FORBIDDEN = "FORBIDDEN"
    STORAGE = "STORAGE"
    DATA_LOSS = "DATA_LOSS"
    QUOTA_JOBS = "QUOTA_JOBS"
    QUOTA_LINES = "QUOTA_LINES"
    QUOTA_BYTES = "QUOTA_BYTES"
    RATE_LIMITED = "RATE_LIMITED"
    HANDOVER = "HANDOVER"


class ServiceError(SpillwayError):
    """Root of what a call to the service can raise. `reason` tells programs, `message` and `hint` tell people."""

    def __init__(self, reason: Reason, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason


class InvalidError(ServiceError):
    """The call itself is wrong, whatever the state of the service."""

    def __init__(self, message: str, hint: str = "", reason: Reason = Reason.INVALID_ARGUMENT) -> None:
        super().__init__(reason, message, hint)


class NotFoundError(ServiceError):
    """There is no such thing."""


class ConflictError(ServiceError):
    """The call is fine, but not in this state."""


class AlreadyExistsError(ServiceError):
    """The name is taken by something else."""


class ResourceError(ServiceError):
    """A limit, the disk, or a hand-over between gateways stands in the way.

    `retry_s`: after how long another try may fare better, if known.
    """

    def __init__(self, reason: Reason, message: str, hint: str = "", retry_s: float | None = None) -> None:
        super().__init__(reason, message, hint)
        self.retry_s = retry_s


class DamagedError(ServiceError):
    """What was kept is damaged on disk and cannot be restored."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(Reason.DATA_LOSS, message, hint)


class UnauthenticatedError(ServiceError):
    """The caller did not say who it is, or not in a way that can be believed."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(Reason.UNAUTHENTICATED, message, hint)


class ForbiddenError(ServiceError):
    """The caller is known, and may not do this."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(Reason.FORBIDDEN, message, hint)
