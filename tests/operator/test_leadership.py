"""Who leads, and how soon: one at a time, but a process restarted in its pod does not wait for itself."""

from __future__ import annotations

import asyncio

import pytest
from kube import Kube

from spillway.operator.cluster import Cluster
from spillway.operator.leadership import Leadership, LeadershipLostError, LeaseTimes

NEVER = LeaseTimes(duration_s=3600.0, renew_s=0.1, give_up_s=1800.0)
"""Nobody gets the Lease by waiting for it."""


def held(kube: Kube, space: str) -> str:
    holder: str = kube.get("Lease", "spillway-operator", space)["spec"]["holderIdentity"]
    return holder


def test_restarted_in_its_pod_it_leads_at_once_and_what_it_was_stops(kube: Kube, space: str) -> None:
    async def story() -> None:
        async with Cluster() as cluster:
            first, second = (Leadership(cluster, space, f"host/pod-1/{chance}", NEVER) for chance in "ab")
            await first.acquire()
            await second.acquire()
            assert held(kube, space) == "host/pod-1/b"
            with pytest.raises(LeadershipLostError):
                await first.keep()

    asyncio.run(story())


@pytest.mark.parametrize("other", ["host/pod-10/c", "host/pod-2/c", "host-1-c", "host/pod-1"])
def test_another_pod_waits(kube: Kube, space: str, other: str) -> None:
    async def story() -> None:
        async with Cluster() as cluster:
            await Leadership(cluster, space, "host/pod-1/a", NEVER).acquire()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(Leadership(cluster, space, other, NEVER).acquire(), 0.5)

    asyncio.run(story())
    assert held(kube, space) == "host/pod-1/a"
