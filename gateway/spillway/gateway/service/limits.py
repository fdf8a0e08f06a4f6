"""What each tenant may have and ask for: quotas, a share of the agents, calls per second.

The file is TOML: a table `default` for all tenants, and a table `tenant.NAME` for each that differs from it in some.

    [default]
    jobs = 100              # that have not ended
    lines = 10_000_000      # of jobs that have not ended
    input_bytes = 1_000_000_000_000   # of all inputs that are kept, equal ones once
    calls_per_second = 50.0
    [tenant.alice]
    weight = 3.0            # share of the agents, against that of others
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from spillway.api.errors import SpillwayError
from spillway.gateway.service.errors import Reason, ResourceError

BURST_S = 2.0
"""Unused calls are saved up for so long."""


class LimitsFileError(SpillwayError):
    """The file of limits cannot be read or understood."""


class TenantLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """None: no limit."""

    jobs: int | None = None
    lines: int | None = None
    input_bytes: int | None = None
    calls_per_second: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        numbers = (self.jobs, self.lines, self.input_bytes, self.calls_per_second)
        if any(number is not None and number <= 0 for number in numbers) or not self.weight > 0:
            raise ValueError("limits and weights must be greater than zero")

    def check(self, used: Usage, new: Usage) -> None:
        """Raises ResourceError if a tenant that has `used` may not have `new` as well."""
        for limit, have, more, what, reason in (
            (self.jobs, used.jobs, new.jobs, "jobs that have not ended", Reason.QUOTA_JOBS),
            (self.lines, used.lines, new.lines, "lines in jobs that have not ended", Reason.QUOTA_LINES),
            (self.input_bytes, used.input_bytes, new.input_bytes, "bytes of input", Reason.QUOTA_BYTES),
        ):
            if limit is not None and more and have + more > limit:
                hint = "Delete jobs that have ended." if reason is Reason.QUOTA_BYTES else "Wait for a job to end."
                message = f"your quota is {limit} {what}: you have {have}, and this would add {more}"
                raise ResourceError(reason, message, hint)


@dataclass(frozen=True, slots=True)
class Usage:
    """What counts against quotas: jobs and lines that have not ended, bytes of all inputs kept, equal ones once."""

    jobs: int = 0
    lines: int = 0
    input_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a tenant has: jobs and lines that have not ended, and the size of each content kept, by its digest."""

    jobs: int
    lines: int
    contents: Mapping[str, int]

    def usage(self) -> Usage:
        """As it counts against quotas."""
        return Usage(self.jobs, self.lines, sum(self.contents.values()))

    def more(self, content: str, size_bytes: int) -> int:
        """How many bytes a content would add: none if the tenant has it already."""
        return 0 if content in self.contents else size_bytes


@dataclass(frozen=True, slots=True)
class Limits:
    """Of all tenants."""

    default: TenantLimits = field(default_factory=TenantLimits)
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)

    def of(self, tenant: str) -> TenantLimits:
        """What holds for a tenant."""
        return self.tenants.get(tenant, self.default)

    @classmethod
    def load(cls, path: Path) -> Limits:
        """Raises LimitsFileError."""
        try:
            stated = msgspec.convert(tomllib.loads(path.read_text()), _LimitsFile)
            own = {name: _limits(stated.default | limits) for name, limits in stated.tenant.items()}
            return cls(_limits(stated.default), own)
        except (OSError, ValueError) as error:
            raise LimitsFileError(f"the limits in {path} cannot be used: {error}") from error


class CallRate:
    """A token bucket for each tenant. Pure: whoever calls says what time it is."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}  # calls left, and when that was so

    def spend(self, tenant: str, per_second: float | None, now_s: float) -> None:
        """One call. Raises ResourceError with the time to wait if there was one too many."""
        if per_second is None:
            return
        most = max(1.0, per_second * BURST_S)
        left, then_s = self._buckets.get(tenant, (most, now_s))
        left = min(most, left + (now_s - then_s) * per_second)
        if left < 1:
            self._buckets[tenant] = (left, now_s)
            wait_s = (1 - left) / per_second
            message = f"more than {per_second:g} calls a second"
            raise ResourceError(Reason.RATE_LIMITED, message, "Call less often.", retry_s=wait_s)
        self._buckets[tenant] = (left - 1, now_s)


class _LimitsFile(msgspec.Struct, forbid_unknown_fields=True):
    default: dict[str, Any] = {}
    tenant: dict[str, dict[str, Any]] = {}


def _limits(stated: dict[str, Any]) -> TenantLimits:
    return msgspec.convert(stated, TenantLimits)
