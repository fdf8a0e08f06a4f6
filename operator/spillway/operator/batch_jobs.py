"""One look at a BatchJob and at the gateway's job, and what follows."""

from __future__ import annotations

import base64
import binascii
import logging
from dataclasses import dataclass
from datetime import datetime

from spillway.api.client.batch import Order
from spillway.api.resources import BatchJob
from spillway.api.resources.batch_job import FINAL_STATES
from spillway.operator.cluster import Cluster, Key, Manifest, tell_status
from spillway.operator.desired.batch_jobs import INPUT_MISSING, GatewayJob, Step, Trouble, decide, found_status, poll_s
from spillway.operator.errors import NotFoundError
from spillway.operator.gateway import Gateway, TroubleError
from spillway.operator.names import FINALIZER

log = logging.getLogger(__name__)

INPUT_RETRY_S = 10.0
"""How soon to look again for lines that are not there: we watch no ConfigMap, and no bucket."""
_DEPLOYMENTS = "/apis/spillway.dev/v1alpha1/modeldeployments"
_ORDERS = {Step.PAUSE: Order.PAUSE, Step.RESUME: Order.RESUME}


@dataclass(frozen=True, slots=True)
class BatchJobs:
    """Carries out decisions on BatchJobs."""

    cluster: Cluster
    gateway: Gateway

    async def reconcile(self, namespace: str, name: str, now_s: float) -> float | None:
        """Looks, decides, acts. Returns the Unix time to look again at the latest, or None.

        Repeated after any failure it goes on where it was: what was submitted is found again by the object's UID.
        Raises ClusterError and GatewayError: look again, later each time.
        """
        key = Key("BatchJob", namespace, name)
        done: Step | None = None
        while True:
            try:
                manifest = await self.cluster.get(key)
            except NotFoundError:
                return None
            batch_job = BatchJob.read(manifest)
            try:
                job = await self._observe(batch_job, manifest)
                step = decide(batch_job, job)
                if step is done:  # the gateway takes its time
                    step = Step.REST
                if step is Step.REST:
                    return await self._rest(key, manifest, job, now_s)
                done = step
                await self._take(step, key, manifest, job, now_s)
            except TroubleError as error:
                status = found_status(batch_job, None, error.trouble, now_s)
                await tell_status(self.cluster, key, manifest, status)
                if error.trouble.reason == INPUT_MISSING:
                    return now_s + INPUT_RETRY_S
                if not error.trouble.is_final:
                    raise

    async def _observe(self, batch_job: BatchJob, manifest: Manifest) -> GatewayJob | None:
        """The gateway's job. It is not asked where the answer is known, so that it may be away then."""
        if batch_job.status.state in FINAL_STATES:
            return None
        if batch_job.status.job:
            return await self.gateway.get(batch_job.status.job)
        if FINALIZER not in batch_job.metadata.finalizers:
            return None  # nothing was ever submitted
        return await self.gateway.find(batch_job.metadata.uid, manifest["metadata"]["creationTimestamp"])

    async def _take(self, step: Step, key: Key, manifest: Manifest, job: GatewayJob | None, now_s: float) -> None:
        where = f"{key.namespace}/{key.name}"
        if step is Step.HOLD:
            await self._set_finalizers(key, manifest, [*manifest["metadata"].get("finalizers", ()), FINALIZER])
        elif step is Step.SUBMIT:
            batch_job = BatchJob.read(manifest)
            made = await self.gateway.submit(batch_job, await self._input(batch_job))
            log.info("BatchJob %s: submitted as %s", where, made.name)
            await tell_status(self.cluster, key, manifest, found_status(batch_job, made, None, now_s))
        elif step is Step.RELEASE or job is None:
            await self._release(key, manifest)
        elif step is Step.CANCEL:
            await self.gateway.order(job.name, Order.CANCEL)
            log.info("BatchJob %s: deleted, so %s is cancelled", where, job.name)
            await self._release(key, manifest)
        else:
            await self.gateway.order(job.name, _ORDERS[step])
            log.info("BatchJob %s: %s %s", where, job.name, "paused" if step is Step.PAUSE else "resumed")

    async def _rest(self, key: Key, manifest: Manifest, job: GatewayJob | None, now_s: float) -> float | None:
        batch_job = BatchJob.read(manifest)
        if batch_job.metadata.deletion_timestamp is not None:
            return None
        if job is not None and job.why and job.state == "Running":
            job = await self._explained(job, batch_job.spec.model)
        status = found_status(batch_job, job, None, now_s)
        if await tell_status(self.cluster, key, manifest, status) and status.state != batch_job.status.state:
            log.info("BatchJob %s/%s: %s", key.namespace, key.name, status.state)
        if job is None:
            return None
        if job.is_final:
            return now_s  # the finalizer goes next, now that the status tells of the end
        age_s = now_s - datetime.fromisoformat(manifest["metadata"]["creationTimestamp"]).timestamp()
        return now_s + poll_s(age_s)

    async def _explained(self, job: GatewayJob, model: str) -> GatewayJob:
        """Why nothing runs, with what the model's deployment says of itself."""
        found = await self.cluster.list(_DEPLOYMENTS, fieldSelector=f"metadata.name={model}")
        if not found:
            return _because(job, f"there is no ModelDeployment {model}")
        for each in found:
            for said in each.get("status", {}).get("conditions", ()):
                if said["type"] == "Ready" and said["status"] == "False":
                    return _because(job, f"ModelDeployment {model}: {said['message']}")
        return job

    async def _input(self, batch_job: BatchJob) -> bytes | str:
        """The request lines, or where the gateway is to fetch them. Raises TroubleError where they are not there."""
        asked = batch_job.spec.input
        if asked.inline is not None:
            return asked.inline.encode()
        if asked.uri is not None:
            return asked.uri
        if asked.config_map is None:
            raise TroubleError(
                Trouble("Submitted", "NoInput", "neither inline, configMap nor uri is given", is_final=True)
            )
        name, key = asked.config_map.name, asked.config_map.key
        try:
            found = await self.cluster.get(Key("ConfigMap", batch_job.metadata.namespace, name))
            if key in found.get("data", {}):
                return str(found["data"][key]).encode()
            return base64.b64decode(found.get("binaryData", {})[key], validate=True)
        except (NotFoundError, KeyError, binascii.Error) as error:
            message = f"the ConfigMap {name} does not exist, or has no key {key}"
            raise TroubleError(Trouble("Submitted", INPUT_MISSING, message)) from error

    async def _release(self, key: Key, manifest: Manifest) -> None:
        others = [each for each in manifest["metadata"].get("finalizers", ()) if each != FINALIZER]
        await self._set_finalizers(key, manifest, others)

    async def _set_finalizers(self, key: Key, manifest: Manifest, finalizers: list[str]) -> None:
        """Raises ConflictError where the object changed since it was read: others put theirs on it."""
        metadata = {"resourceVersion": manifest["metadata"]["resourceVersion"], "finalizers": finalizers}
        await self.cluster.merge(key, {"metadata": metadata})


def _because(job: GatewayJob, why: str) -> GatewayJob:
    return GatewayJob(job.name, job.state, job.lines, f"{job.why}; {why}"[:900], job.end_s)
