"""The operator as a process: watches by Kopf, one queue of work, one leader."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from typing import Any

import kopf

from spillway.operator.cluster import Cluster
from spillway.operator.deployments import Deployments
from spillway.operator.desired.agents import AgentSettings
from spillway.operator.leadership import Leadership
from spillway.operator.names import DEPLOYMENT_LABEL
from spillway.operator.work import Work

log = logging.getLogger(__name__)


async def run(settings: AgentSettings, namespace: str) -> None:
    """Until SIGTERM or SIGINT. `namespace`: where the Lease is. Raises LeadershipLostError: start again."""
    identity = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    async with Cluster() as cluster:
        leadership = Leadership(cluster, namespace, identity)
        await leadership.acquire()
        log.info("leading as %s", identity)
        work = Work(Deployments(cluster, settings, asyncio.Lock()).reconcile)
        watching = asyncio.create_task(_watch(work))
        tasks = [watching, asyncio.create_task(work.run()), asyncio.create_task(leadership.keep())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled():  # Kopf cancels what it finds in the loop when it stops
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await leadership.release()


async def _watch(work: Work) -> None:
    """Every event only names what to look at; the look itself reads what is there by then."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(settings: kopf.OperatorSettings, **_: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)

    @kopf.on.event("spillway.dev", "v1alpha1", "modeldeployments", registry=registry)
    async def deployment(namespace: str | None, name: str | None, **_: Any) -> None:
        if namespace and name:
            work.add(namespace, name)

    @kopf.on.event("", "v1", "pods", labels={DEPLOYMENT_LABEL: kopf.PRESENT}, registry=registry)
    async def agent(namespace: str | None, labels: Any, **_: Any) -> None:
        if namespace:
            work.add(namespace, labels[DEPLOYMENT_LABEL])

    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    await kopf.operator(registry=registry, settings=settings, standalone=True, clusterwide=True)
