"""What all jobs of a service have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spillway.api.tracing import Traces
from spillway.gateway.service.counts import ServiceCounts
from spillway.gateway.service.leases import LeaseRules


@dataclass(frozen=True, slots=True)
class House:
    """Given to each job."""

    rules: LeaseRules
    announce: Callable[[], None]
    """To be called when there may be lines to hand out that were not there before."""
    counts: ServiceCounts
    traces: Traces
    check: Callable[[], None]
    """Raises DirectoryLostError if nothing may be written any more."""
