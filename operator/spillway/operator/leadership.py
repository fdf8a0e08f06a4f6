"""One operator acts at a time: a Lease that its holder renews, and that others take when it stands still."""

from __future__ import annotations

import asyncio
import logging
import time

from spillway.operator.cluster import Cluster, Key
from spillway.operator.desired.deployment_status import rfc3339
from spillway.operator.errors import ClusterError, ConflictError, NotFoundError

log = logging.getLogger(__name__)

DURATION_S = 15
_RENEW_S = 3.0
_GIVE_UP_S = 10.0
"""Without a renewal for so long the holder stops: before anybody else may start."""


class LeadershipLostError(ClusterError):
    """The Lease could not be renewed in time, or somebody else holds it."""


class Leadership:
    """The Lease `spillway-operator` of a namespace. Others' clocks are not trusted: one that stood still is old."""

    def __init__(self, cluster: Cluster, namespace: str, identity: str) -> None:
        self._cluster = cluster
        self._key = Key("Lease", namespace, "spillway-operator")
        self._identity = identity

    async def acquire(self) -> None:
        """Returns once it is ours."""
        seen, since = "", time.monotonic()
        while True:
            try:
                lease = await self._cluster.get(self._key)
                version = lease["metadata"]["resourceVersion"]
                if version != seen:
                    seen, since = version, time.monotonic()
                if not lease["spec"].get("holderIdentity") or time.monotonic() - since > DURATION_S:
                    await self._write(version, self._identity)
                    return
            except NotFoundError:
                await self._create()
            except ConflictError:
                continue
            except ClusterError as error:
                log.warning("cannot read the Lease: %s", error)
            await asyncio.sleep(1.0)

    async def keep(self) -> None:
        """Renews for ever. Raises LeadershipLostError."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                async with asyncio.timeout(max(0.1, renewed + _GIVE_UP_S - time.monotonic())):
                    lease = await self._cluster.get(self._key)
                    if lease["spec"].get("holderIdentity") != self._identity:
                        raise LeadershipLostError("another operator holds the Lease")  # noqa: TRY301
                    began = time.monotonic()
                    await self._write(lease["metadata"]["resourceVersion"], self._identity)
                    renewed = began
            except LeadershipLostError:
                raise
            except (ClusterError, TimeoutError) as error:
                if time.monotonic() - renewed >= _GIVE_UP_S:
                    raise LeadershipLostError(f"the Lease was not renewed for {_GIVE_UP_S:g} s") from error
                log.warning("the Lease was not renewed: %s", error)

    async def release(self) -> None:
        """So that the next one need not wait."""
        lease = await self._cluster.get(self._key)
        if lease["spec"].get("holderIdentity") == self._identity:
            await self._write(lease["metadata"]["resourceVersion"], "")

    async def _write(self, version: str, holder: str) -> None:
        spec = {"holderIdentity": holder, "renewTime": rfc3339(time.time()), "leaseDurationSeconds": DURATION_S}
        await self._cluster.merge(self._key, {"metadata": {"resourceVersion": version}, "spec": spec})

    async def _create(self) -> None:
        metadata = {"name": self._key.name, "namespace": self._key.namespace}
        await self._cluster.create(
            {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": {}}
        )
