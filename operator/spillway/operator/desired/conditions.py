"""Conditions change their time only with their status, so that saying the same again writes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from spillway.api.resources import Condition


@dataclass(frozen=True, slots=True)
class Finding:
    """What a reconciliation found: `message` is one plain sentence."""

    type: str
    holds: bool
    reason: str
    message: str


def conditions(
    findings: Iterable[Finding], former: Iterable[Condition], observed_generation: int, now: str
) -> tuple[Condition, ...]:
    """The findings as conditions, by type. `now` in RFC 3339; kept from `former` where the status is the same."""
    since = {(each.type, each.status): each.last_transition_time for each in former}
    said = []
    for finding in sorted(findings, key=lambda each: each.type):
        status: Literal["True", "False"] = "True" if finding.holds else "False"
        said.append(
            Condition(
                type=finding.type,
                status=status,
                reason=finding.reason,
                message=finding.message[:1024],
                last_transition_time=since.get((finding.type, status), now),
                observed_generation=observed_generation,
            )
        )
    return tuple(said)


def rfc3339(unix_s: float) -> str:
    """UTC, to the microsecond."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
