"""An ordinary tier that misbehaves on purpose: for tests, chaos runs and drills.

It wraps any tier. Its faults are those of real devices, and lie below the store's verification, so whatever it does, a
store above it returns right bytes or a miss.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, fields

from ..buffers import Bytes
from ..errors import ConfigError
from ..header import BlockHeader
from ..identity import BlockHash
from ..outcomes import MissReason, StoreOutcome
from .base import Tier, TierUsage


@dataclass(frozen=True, slots=True)
class Faults:
    """The share of operations (0 … 1) that each fault strikes, drawn from ``seed``; several may strike one operation.

    ``delay``: takes ``delay_s`` longer. ``stuck``: takes ``stuck_s`` longer, as a hung device. ``short_read``: a load
    ends early. ``bit_flip``: one bit of a loaded block is wrong. ``lost``: a stored block is gone when it is loaded.
    ``misplaced``: a load brings another block's bytes. ``full``: a store finds no space. ``io_error``: a load or store
    fails.
    """

    seed: int = 0
    delay: float = 0.0
    delay_s: float = 0.01
    stuck: float = 0.0
    stuck_s: float = 30.0
    short_read: float = 0.0
    bit_flip: float = 0.0
    lost: float = 0.0
    misplaced: float = 0.0
    full: float = 0.0
    io_error: float = 0.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a share outside 0 … 1."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "seed" and not item.name.endswith("_s") and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{item.name} is a share of operations, 0 … 1, not {value}")


class FaultyTier(Tier):
    """``inner`` with ``faults``. ``struck`` counts them by name. `heal` ends them all, stuck operations included."""

    def __init__(self, inner: Tier, faults: Faults) -> None:
        self.inner = inner
        self.name = inner.name
        self.faults = faults
        self.struck: Counter[str] = Counter()
        self._random = random.Random(faults.seed)  # noqa: S311 - faults must repeat, not be secret
        self._lock = threading.Lock()
        self._healed = threading.Event()
        self._last: BlockHash | None = None

    def heal(self) -> None:
        """Behave from now on."""
        self._healed.set()

    def store(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:
        """See `Tier.store`."""
        self._slow_down()
        if self._strikes("full"):
            return StoreOutcome.NO_SPACE
        if self._strikes("io_error"):
            return StoreOutcome.IO_ERROR
        return self.inner.store(header, stored)

    def load(self, block: BlockHash, out: Bytes) -> BlockHeader | MissReason:
        """See `Tier.load`."""
        self._slow_down()
        if self._strikes("io_error"):
            return MissReason.IO_ERROR
        if self._strikes("short_read"):
            return MissReason.SHORT_READ
        if self._strikes("lost"):
            self.inner.drop(block)
        other, self._last = self._last, block
        if other not in (None, block) and self._strikes("misplaced"):
            block = other or block
        answer = self.inner.load(block, out)
        if isinstance(answer, BlockHeader) and self._strikes("bit_flip"):
            with self._lock:
                bit = self._random.randrange(8 * answer.stored_bytes)
            out[bit // 8] ^= 1 << bit % 8
        return answer

    def contains(self, block: BlockHash) -> bool:
        """See `Tier.contains`."""
        return self.inner.contains(block)

    def drop(self, block: BlockHash) -> bool:
        """See `Tier.drop`."""
        return self.inner.drop(block)

    def usage(self) -> TierUsage:
        """See `Tier.usage`."""
        return self.inner.usage()

    def check(self) -> None:
        """See `Tier.check`."""
        self.inner.check()

    def close(self) -> None:
        """See `Tier.close`."""
        self.heal()
        self.inner.close()

    def _slow_down(self) -> None:
        if self._strikes("delay"):
            time.sleep(self.faults.delay_s)
        if self._strikes("stuck"):
            self._healed.wait(self.faults.stuck_s)

    def _strikes(self, fault: str) -> bool:
        share: float = getattr(self.faults, fault)
        if share == 0.0 or self._healed.is_set():
            return False
        with self._lock:
            hit = self._random.random() < share
            self.struck[fault] += hit
            return hit
