"""One operator acts at a time: a Lease that its holder renews, and that others take when it stands still."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from spillway.operator.cluster import Cluster, Key, Manifest
from spillway.operator.desired.conditions import rfc3339
from spillway.operator.errors import ClusterError, ConflictError, NotFoundError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """After `give_up_s` without a renewal the holder stops: before anybody else may start, after `duration_s`."""

    duration_s: float = 15.0
    renew_s: float = 3.0
    give_up_s: float = 10.0


class LeadershipLostError(Exception):
    """The Lease could not be renewed in time, or somebody else holds it. No SpillwayError: there is no going on."""


class Leadership:
    """The Lease `spillway-operator` of a namespace. Others' clocks are not trusted: one that stood still is old.

    `identity` may begin with "POD/": what an earlier process of that pod held is free, since a pod's container starts
    again only once it has ended.
    """

    def __init__(self, cluster: Cluster, namespace: str, identity: str, times: LeaseTimes = LeaseTimes()) -> None:
        self._cluster = cluster
        self._key = Key("Lease", namespace, "spillway-operator")
        self._identity, self._times = identity, times
        self._renewed_s = float("-inf")

    def check(self) -> None:
        """Raises LeadershipLostError where the Lease may be another's by now.

        To be asked before each write: a process that was frozen wakes up in the middle of a look.
        """
        if time.monotonic() - self._renewed_s >= self._times.give_up_s:
            raise LeadershipLostError(f"the Lease was not renewed for {self._times.give_up_s:g} s")

    async def acquire(self) -> None:
        """Returns once it is ours."""
        seen, since = "", time.monotonic()
        while True:
            try:
                lease = await self._found()
                version = lease["metadata"]["resourceVersion"]
                if version != seen:
                    seen, since = version, time.monotonic()
                if (
                    self._is_free(lease["spec"].get("holderIdentity"))
                    or time.monotonic() - since > self._times.duration_s
                ):
                    await self._take(version)
                    return
            except ConflictError:
                continue
            except ClusterError as error:
                log.warning("the Lease cannot be had: %s", error)
            await asyncio.sleep(min(1.0, self._times.renew_s))

    async def keep(self) -> None:
        """Renews for ever. Raises LeadershipLostError."""
        while True:
            await asyncio.sleep(self._times.renew_s)
            try:
                async with asyncio.timeout(max(0.1, self._renewed_s + self._times.give_up_s - time.monotonic())):
                    lease = await self._cluster.get(self._key)
                    if lease["spec"].get("holderIdentity") != self._identity:
                        raise LeadershipLostError("another operator holds the Lease")
                    await self._take(lease["metadata"]["resourceVersion"])
            except (ClusterError, TimeoutError) as error:
                self.check()
                log.warning("the Lease was not renewed: %s", error)

    async def release(self) -> None:
        """So that the next one need not wait."""
        lease = await self._cluster.get(self._key)
        if lease["spec"].get("holderIdentity") == self._identity:
            await self._write(lease["metadata"]["resourceVersion"], "")

    def _is_free(self, holder: str | None) -> bool:
        pod = self._identity.rpartition("/")[0]
        return not holder or (pod != "" and holder.rpartition("/")[0] == pod)

    async def _take(self, version: str) -> None:
        began = time.monotonic()
        await self._write(version, self._identity)
        self._renewed_s = began

    async def _write(self, version: str, holder: str) -> None:
        seconds = max(1, round(self._times.duration_s))
        spec = {"holderIdentity": holder, "renewTime": rfc3339(time.time()), "leaseDurationSeconds": seconds}
        await self._cluster.merge(self._key, {"metadata": {"resourceVersion": version}, "spec": spec})

    async def _found(self) -> Manifest:
        """The Lease, made where there is none. Raises ConflictError where another operator just did."""
        try:
            return await self._cluster.get(self._key)
        except NotFoundError:
            metadata = {"name": self._key.name, "namespace": self._key.namespace}
            return await self._cluster.create(
                {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": {}}
            )
