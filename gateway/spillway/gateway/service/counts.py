"""What went through a gateway since it was started. For metrics: nothing is decided by it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ServiceCounts:
    """Counters that only grow. Lines refused at intake are not among `lines_failed`: no agent had them."""

    jobs_submitted: int = 0
    input_bytes: int = 0
    lines_completed: int = 0
    lines_failed: int = 0
    lines_leased: int = 0
    leases_granted: int = 0
    leases_expired: int = 0
