"""Whose turn it is: shares of one model's agents among tenants, by the tokens they used.

Stride scheduling (Waldspurger and Weihl, 1995): each tenant's virtual time advances by tokens divided by its weight,
and whoever is furthest behind goes next. Over any stretch in which two tenants both have work, what they got differs
from their shares by no more than the largest single charges. Nobody starves: a tenant that waits stands still while
the others move past it. One that comes back from having no work starts at the present, so idleness saves up nothing.
"""

from __future__ import annotations

from collections.abc import Mapping


class FairShare:
    """Virtual times of the tenants of one model. No clock, no I/O."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._active: frozenset[str] = frozenset()
        self._now = 0.0

    def order(self, weights: Mapping[str, float]) -> list[str]:
        """Tenants that have work now, whose turn it is first. `weights` (> 0) are those of all that have work."""
        staying = self._active.intersection(weights) or self._active  # all left: the present is where they were
        self._now = max(self._now, min((self._times[tenant] for tenant in staying), default=self._now))
        for tenant in weights:
            if tenant not in self._active:
                self._times[tenant] = max(self._times.get(tenant, self._now), self._now)
        self._active = frozenset(weights)
        self._forget_idle()
        return sorted(weights, key=lambda tenant: (self._times[tenant], tenant))

    def charge(self, tenant: str, tokens: float, weight: float) -> None:
        """The tenant used tokens, whether or not it has work now."""
        self._times[tenant] = self._times.get(tenant, self._now) + tokens / weight

    def _forget_idle(self) -> None:
        """Who is idle and not ahead of the present would start there anyway."""
        gone = [tenant for tenant, time in self._times.items() if tenant not in self._active and time <= self._now]
        for tenant in gone:
            del self._times[tenant]
