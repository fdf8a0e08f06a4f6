"""Whether this gateway has the jobs of a data directory, or stands by and knows who has.

Gateways over one directory find each other through it alone (`claim.py`). One owns the jobs; the others pass every call
on to it, and each tries a few times a second to take its place, which the kernel allows once the owner is dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from spillway.api.errors import JobError, JobLockedError, SpillwayError
from spillway.gateway.service.claim import Claim, Owner, Place
from spillway.gateway.service.coordinator import Coordinator, ServiceConfig, Shelved
from spillway.gateway.service.errors import Reason, ResourceError
from spillway.gateway.service.link import RETRY_S, Link, Trust

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""So often a gateway that stands by tries to take the directory, and one that has it makes sure that it still does."""
FRESH_S = 1.0
"""An owner that has not made sure for so long (it was frozen) does so before it answers the next call."""
PATIENCE_S = 5.0
"""A call waits so long for an owner before it is refused."""
TROUBLE_S = 1.0


class Ownership:
    """The part of one gateway in the service. Lives in one event loop."""

    def __init__(self, config: ServiceConfig, trust: Trust) -> None:
        self.config = config
        self._trust = trust
        self._place = Place()
        self._shelved: Shelved = lambda _tenant: {}
        self._claim: Claim | None = None
        self._coordinator: Coordinator | None = None
        self._checked_s = 0.0
        self._link: Link | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, grpc_address: str) -> None:
        """Takes the directory and loads its jobs; or, if another gateway has it, stands by.

        `grpc_address` is where other gateways reach this one. Raises JobError, OSError if the directory cannot be used,
        TargetError.
        """
        self._place = Place(grpc_address)
        try:
            await self._take_or_look()
        except BaseException:
            await self.stop()
            raise
        self._task = asyncio.create_task(self._run(), name="spillway-ownership")

    async def stop(self) -> None:
        """Lets go of the directory, so that another gateway may take it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self._let_go()
        finally:
            await self._unlink()

    @property
    def coordinator(self) -> Coordinator:
        """The jobs, if this gateway has them. Raises ResourceError if not, or not any more."""
        if self._coordinator is None:
            raise self._refusal()
        return self._coordinator

    @property
    def owns(self) -> bool:
        """Whether this gateway has the jobs."""
        return self._coordinator is not None

    @property
    def generation(self) -> int:
        """Of the owner that this gateway knows: itself or another. 0 if it knows none."""
        if self._claim is not None:
            return self._claim.owner.generation
        return 0 if self._link is None else self._link.owner.generation

    @property
    def usable(self) -> bool:
        """Whether a call would be answered now."""
        return self.owns or (self._link is not None and self._link.ready)

    @property
    def changed(self) -> asyncio.Event:
        """Set when something of this may have changed; take a new one after each."""
        return self._changed

    def admit(self, tenant: str) -> None:
        """As Coordinator.admit. Raises ResourceError."""
        self.coordinator.admit(tenant)

    def serves_http(self, address: str) -> None:
        """Where other gateways reach this one over HTTP, too. Raises StorageError."""
        self._place = replace(self._place, http=address)
        if self._claim is not None:
            self._claim.move(self._place)

    def shelves(self, contents: Shelved) -> None:
        """What tenants have outside of jobs: see Coordinator.shelved."""
        self._shelved = contents
        if self._coordinator is not None:
            self._coordinator.shelved = contents

    async def way(self, *, relayed: bool) -> Coordinator | Link:
        """Who answers a call: the jobs here, or another gateway. Waits a while if nobody does; then it raises
        ResourceError.

        A call that was relayed once is not relayed again: two gateways that each take the other for the owner, since
        one of them knows the past, must not send it back and forth.
        """
        end_s = time.monotonic() + PATIENCE_S
        while True:
            changed = self._changed
            if self._coordinator is not None and self._sure():
                return self._coordinator
            if self._link is not None and self._link.ready and not relayed:
                return self._link
            try:
                await asyncio.wait_for(changed.wait(), end_s - time.monotonic())
            except TimeoutError:
                raise self._refusal() from None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self._claim is None:
                    await self._take_or_look()
                else:
                    self._make_sure(self._claim)
            except Exception as error:  # also a defect must not end this loop: nobody would have the jobs for good
                log.critical(
                    "this gateway cannot have the jobs in %s: %s", self.config.data, error, exc_info=_odd(error)
                )
                await self._let_go_whatever_comes()
                await asyncio.sleep(TROUBLE_S)

    async def _take_or_look(self) -> None:
        try:
            claim = self._claim = Claim(self.config.data, self._place)
        except JobLockedError:
            await self._look()
            return
        log.info("this gateway has the jobs in %s: generation %d", claim.data, claim.owner.generation)
        await self._unlink()
        coordinator = Coordinator(self.config, claim)
        coordinator.shelved = self._shelved
        try:
            await coordinator.start()
            self._make_sure(claim)
        except BaseException:
            await coordinator.stop()
            raise
        self._coordinator = coordinator
        self._tell()

    async def _look(self) -> None:
        """Finds out who has the directory."""
        owner = Owner.read(self.config.data)
        if owner is None or owner.grpc == self._place.grpc:  # who has it has not said so yet: that one is of the past
            await self._unlink()
        elif self._link is not None and (self._link.owner.id, self._link.owner.grpc) == (owner.id, owner.grpc):
            self._link.owner = owner  # it may have said where it serves HTTP
        else:
            await self._unlink()
            self._link = Link(owner, self._trust, self._tell)
            log.info("standing by: the gateway at %s has the jobs in %s", owner.grpc, self.config.data)

    async def _unlink(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    def _make_sure(self, claim: Claim) -> None:
        claim.check()
        self._checked_s = _now_s()

    def _sure(self) -> bool:
        """Whether the directory is ours still; that is found out anew if it is long since it was."""
        assert self._claim is not None
        if _now_s() - self._checked_s > FRESH_S:
            try:
                self._make_sure(self._claim)
            except JobError:  # `_run` will meet it too, and act on it
                return False
        return True

    async def _let_go(self) -> None:
        coordinator, claim = self._coordinator, self._claim
        self._coordinator = self._claim = None
        self._tell()
        try:
            if coordinator is not None:
                await coordinator.stop()
        finally:
            if claim is not None:
                claim.release()

    async def _let_go_whatever_comes(self) -> None:
        try:
            await self._let_go()
        except Exception as error:
            log.critical("results of the last moments may run again: %s", error, exc_info=_odd(error))

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _refusal(self) -> ResourceError:
        if self._link is not None:
            return self._link.refusal()
        message = f"no gateway has the jobs in {self.config.data.name} at this moment"
        return ResourceError(Reason.HANDOVER, message, "Try again.", retry_s=RETRY_S)


def _odd(error: Exception) -> Exception | None:
    """The error if only its trace could explain it."""
    return None if isinstance(error, SpillwayError | OSError) else error


def _now_s() -> float:
    """Goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
