"""The operator as a process: watches by Kopf, work by kind, one leader."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kopf
from aiohttp import web

from spillway.operator.batch_jobs import BatchJobs
from spillway.operator.cluster import Cluster
from spillway.operator.config import OperatorConfig
from spillway.operator.deployments import Deployments
from spillway.operator.errors import ConfigError
from spillway.operator.gateway import Gateway
from spillway.operator.kv_stores import KVStores
from spillway.operator.leadership import Leadership, LeaseTimes
from spillway.operator.names import DEPLOYMENT_LABEL, STORE_LABEL
from spillway.operator.work import Work

log = logging.getLogger(__name__)

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_SETTLE_S = 0.1
"""Events come in bundles: what we write comes back as one, and so does what others make of it."""
_LANES, _JOB_LANES = 4, 16
"""Objects of a kind that are looked at side by side: one whose input is being fetched does not hold up the others."""


@dataclass(frozen=True, slots=True)
class Process:
    """How one operator runs. `namespace`: where the Lease is; `health`: "host:port" of /healthz, or None."""

    config: OperatorConfig
    namespace: str
    health: str | None = None
    times: LeaseTimes = field(default_factory=LeaseTimes)


def own_namespace() -> str:
    """That of the pod we run in, else "default"."""
    try:
        return _NAMESPACE.read_text().strip()
    except OSError:
        return "default"


def own_identity() -> str:
    """Ours alone. Where the variable POD_UID tells which pod we are in, it begins with "HOST/POD/"."""
    pod, host, chance = os.environ.get("POD_UID"), socket.gethostname(), secrets.token_hex(4)
    return f"{host}/{pod}/{chance}" if pod else f"{host}-{os.getpid()}-{chance}"


async def run(process: Process) -> None:
    """Until SIGTERM or SIGINT. Raises LeadershipLostError: start again. Raises ConfigError, TargetError."""
    identity = own_identity()
    async with _healthy(process.health), Cluster() as lease_cluster:
        leadership = Leadership(lease_cluster, process.namespace, identity, process.times)
        log.info("waiting for the Lease as %s", identity)
        await leadership.acquire()
        log.info("leading")
        async with Cluster(leadership.check) as cluster, Gateway(process.config.gateway.target()) as gateway:
            await _lead(cluster, gateway, process.config, leadership)
        await leadership.release()


async def _lead(cluster: Cluster, gateway: Gateway, config: OperatorConfig, leadership: Leadership) -> None:
    stores = KVStores(cluster, config.redis)
    deployments = Deployments(cluster, config, stores, asyncio.Lock())
    works = {
        "ModelDeployment": Work("ModelDeployment", deployments.reconcile, _LANES),
        "BatchJob": Work("BatchJob", BatchJobs(cluster, gateway).reconcile, _JOB_LANES),
        "KVStore": Work("KVStore", stores.reconcile, _LANES),
    }
    running = [_watch(works), leadership.keep(), *(each.run() for each in works.values())]
    tasks = [asyncio.create_task(each) for each in running]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():  # Kopf cancels what it finds in the loop when it stops
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(works: dict[str, Work]) -> None:
    """Every event only names what to look at; the look itself reads what is there by then."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(settings: kopf.OperatorSettings, **_: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)

    def named(work: Work) -> Callable[..., Any]:
        async def seen(namespace: str | None, name: str | None, **_: Any) -> None:
            if namespace and name:
                work.add(namespace, name, time.time() + _SETTLE_S)

        return seen

    def labelled(work: Work, label: str) -> Callable[..., Any]:
        async def seen(namespace: str | None, labels: Any, **_: Any) -> None:
            if namespace:
                work.add(namespace, labels[label], time.time() + _SETTLE_S)

        return seen

    for plural, kind in (("modeldeployments", "ModelDeployment"), ("batchjobs", "BatchJob"), ("kvstores", "KVStore")):
        kopf.on.event("spillway.dev", "v1alpha1", plural, id=plural, registry=registry)(named(works[kind]))
    agents, redis = labelled(works["ModelDeployment"], DEPLOYMENT_LABEL), labelled(works["KVStore"], STORE_LABEL)
    kopf.on.event("", "v1", "pods", id="agents", labels={DEPLOYMENT_LABEL: kopf.PRESENT}, registry=registry)(agents)
    kopf.on.event("apps", "v1", "statefulsets", id="redis", labels={STORE_LABEL: kopf.PRESENT}, registry=registry)(
        redis
    )
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # our kinds do not come and go, and watching all others' takes rights
    await kopf.operator(registry=registry, settings=settings, standalone=True, clusterwide=True)


@contextlib.asynccontextmanager
async def _healthy(address: str | None) -> AsyncIterator[None]:
    """Serves /healthz, which answers as long as the loop turns, whoever leads. Raises ConfigError."""
    if address is None:
        yield
        return

    async def well(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    app = web.Application()
    app.router.add_get("/healthz", well)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = address.rpartition(":")
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    except (OSError, ValueError, OverflowError) as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on {address!r}: {error}", "Write it as HOST:PORT.") from error
    try:
        yield
    finally:
        await runner.cleanup()
