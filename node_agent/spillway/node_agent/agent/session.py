"""Three loops between desk and gateway: lease, renew, report. Each goes on for ever, with back-off while it cannot."""

from __future__ import annotations

import asyncio
import logging
import random
import time

from spillway.node_agent.agent.desk import Desk
from spillway.node_agent.agent.lease_traces import LeaseTraces
from spillway.node_agent.agent.wire import CallError, Wire

log = logging.getLogger(__name__)

LEASE_WAIT_S = 10.0
REPORT_LINES = 256
BACK_OFF_S, MAX_BACK_OFF_S = 0.2, 5.0
MAX_RENEWAL_S = 1.0
"""A renewal also brings the news that a job was cancelled, and nobody wants to compute for a second longer."""
IDLE_S = 0.05


class Session:
    """Runs in one event loop; `wake` may be called from there alone."""

    def __init__(self, wire: Wire, desk: Desk, traces: LeaseTraces) -> None:
        self._wire, self._desk, self._traces = wire, desk, traces
        self._news = asyncio.Event()
        self._ttl_s = 0.0

    def wake(self) -> None:
        """There is something to report."""
        self._news.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for loop in (self._lease, self._renew, self._report):
                group.create_task(loop(), name=f"spillway-agent{loop.__name__}")

    async def hand_back(self) -> None:
        """Reports what is done, returns the rest. Tries until it works: whoever calls limits the time."""
        back_off = _BackOff()
        while True:
            try:
                while await self._report_some():
                    pass
                if leases := self._desk.leases:
                    await self._wire.give_back(leases)
                    self._traces.over(leases, "returned")
            except CallError as error:
                if error.final:
                    return
                await back_off.wait(error)
            else:
                return

    async def _lease(self) -> None:
        back_off = _BackOff()
        while True:
            most = min(self._desk.room, max(1, self._desk.max_lines // 4))
            if most < max(1, self._desk.max_lines // 8):
                await asyncio.sleep(IDLE_S)
                continue
            try:
                # The first call after trouble must not wait for lines: its answer shows that the gateway is there.
                leased = await self._wire.lease(most, 0.0 if self._wire.trouble else LEASE_WAIT_S)
            except CallError as error:
                await back_off.wait(error)
                continue
            back_off.reset()
            if leased.lines:
                self._ttl_s = leased.ttl_s
                self._traces.leased(leased.lines, leased.traceparent, self._wire.worker, self._wire.model)
                self._desk.put(leased.lines)

    async def _renew(self) -> None:
        back_off = _BackOff()
        while True:
            await asyncio.sleep(min(self._ttl_s / 3 or MAX_RENEWAL_S, MAX_RENEWAL_S))
            leases = self._desk.leases
            if not leases:
                continue
            try:
                lost = await self._wire.renew(leases)
            except CallError as error:
                await back_off.wait(error)
                continue
            back_off.reset()
            if lost:
                log.warning("%d of %d leases are lost: their lines belong to others now", len(lost), len(leases))
                self._desk.drop(lost)
                self._traces.over(lost, "lost")

    async def _report(self) -> None:
        back_off = _BackOff()
        while True:
            await self._news.wait()
            self._news.clear()
            await asyncio.sleep(IDLE_S)  # lines end in crowds; one call takes many
            try:
                while await self._report_some():
                    back_off.reset()
            except CallError as error:
                self._news.set()
                await back_off.wait(error)

    async def _report_some(self) -> bool:
        outcomes = self._desk.outcomes(REPORT_LINES)
        if not outcomes:
            return False
        lease = outcomes[0].line.lease
        span = self._traces.reporting(lease)
        try:
            await self._wire.report(outcomes, span.traceparent)
        except CallError as error:
            span.end({"spillway.results": len(outcomes)}, error=str(error))
            if not error.final:
                raise
            log.warning("the gateway does not want %d results: %s", len(outcomes), error)
        else:
            span.end({"spillway.results": len(outcomes)})
        self._desk.settle(outcomes)
        self._traces.reported(lease, len(outcomes))
        return True


class _BackOff:
    """Waits that double, with jitter; a log line for the first of a row of failures and one a minute after that."""

    def __init__(self) -> None:
        self._wait_s, self._logged_s = BACK_OFF_S, float("-inf")

    def reset(self) -> None:
        self._wait_s, self._logged_s = BACK_OFF_S, float("-inf")

    async def wait(self, error: CallError) -> None:
        if time.monotonic() - self._logged_s > 60:
            self._logged_s = time.monotonic()
            log.warning("no use of the gateway now, trying again: %s", error)
        await asyncio.sleep(self._wait_s * random.uniform(0.5, 1.0))  # noqa: S311 — jitter
        self._wait_s = min(2 * self._wait_s, MAX_BACK_OFF_S)
