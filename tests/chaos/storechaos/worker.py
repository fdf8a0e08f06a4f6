"""One process of a run: a real store with host memory, a disk, the index in Redis and a block server, told what to do.

Commands come as lines of JSON on standard input, replies go to standard output; everything else goes to standard error.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from spillway.kvstore import BlockHash, BlockStore, Deadlines, Faults, KeyRing, PeersConfig, StoreConfig, block_hash
from spillway.kvstore.index.redis import RedisIndex
from spillway.kvstore.index.redis_client import RedisConfig
from spillway.kvstore.stats import StoreStats
from spillway.kvstore.tiers.disk import tier as disk_tier
from spillway.kvstore.tiers.faulty import FaultyTier

from .burst import BLOCK_BYTES, IDENTITY, Caller, universe
from .ledger import Counts, Figures

TIERS = ("host", "disk")
HOST_BLOCKS = 128
DISK_BLOCKS = 1024
SEGMENT_BYTES = 3 << 20
LEASE_S = 1.5
SETTLE_S = 60.0
PORT = 7400
_CALLERS = 2
_TOKEN = b"a token of chaos runs"
_KEY = bytes(range(32))
_log = logging.getLogger("chaos")


class Settings(msgspec.Struct, frozen=True):
    """How a worker opens its store. ``faulty``: its device fails at a low rate as well; ``encrypted``: its disk is."""

    number: int
    node: str
    host: str
    redis_url: str
    disk_dir: str
    seed: int
    faulty: bool = False
    encrypted: bool = False


class Command(msgspec.Struct):
    """``name`` is a method of `Worker`; of the others each uses what it needs."""

    name: str
    seed: int = 0
    seconds: float = 0.0


class Reply(msgspec.Struct):
    """``held``: blocks, in hexadecimal, with the tiers that hold them as bits. ``error``: what must not have come."""

    counts: Counts = msgspec.field(default_factory=Counts)
    figures: Figures = {}
    held: dict[str, int] = {}
    done: bool = True
    error: str = ""


class _Defects(logging.Handler):
    """Counts what the store calls unforeseen."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


class Worker:
    """Carries out commands."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._defects = _Defects()
        logging.getLogger().addHandler(self._defects)
        self._chains = universe()
        address = f"{settings.host}:{PORT}"
        redis = RedisConfig(settings.redis_url, settings.node, address, lease_s=LEASE_S, timeout_s=0.25, near_s=0.2)
        self._index = RedisIndex(redis, IDENTITY.digest(), TIERS)
        self._store = BlockStore.open(_config(settings), self._index)

    def burst(self, command: Command) -> Reply:
        """Several callers at once for ``seconds``."""
        callers = [Caller(self._store, self._chains, command.seed * _CALLERS + at) for at in range(_CALLERS)]
        threads = [threading.Thread(target=caller.work, args=(command.seconds,)) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = Counts()
        for caller in callers:
            counts.add(caller.counts)
        return self._audited(counts)

    def figures(self, _: Command) -> Reply:
        """Nothing but the figures."""
        return self._audited(Counts())

    def heal(self, _: Command) -> Reply:
        """No more device faults."""
        for tier in self._store._parts.own:
            if isinstance(tier, FaultyTier):
                tier.heal()
        return Reply()

    def settle(self, _: Command) -> Reply:
        """Wait until nothing is under way: all written, Redis told of everything."""
        until = time.monotonic() + SETTLE_S
        written = self._store.flush()
        told = self._index.settle(SETTLE_S)
        while self._store.stats().queued_reads and time.monotonic() < until:
            time.sleep(0.01)
        reply = self._audited(Counts())
        reply.done = written and told
        for lane in self._store._lanes():
            if lane.tier.usage().pinned:
                reply.error = f"{lane.tier.name}: {lane.tier.usage().pinned} slots are pinned with nothing under way"
        return reply

    def held(self, _: Command) -> Reply:
        """Which blocks which tiers hold."""
        held: dict[str, int] = {}
        for position, tier in enumerate(TIERS):
            for block in self._index.snapshot(tier):
                held[block.hex()] = held.get(block.hex(), 0) | 1 << position
        return Reply(held=held)

    def offer(self, command: Command) -> Reply:
        """Put one fresh block, named by ``seed``, for others to fetch."""
        caller = Caller(self._store, self._chains, 0)
        kept = caller.write([_fresh(command.seed)])
        return Reply(caller.counts, done=all(kept))

    def fetch(self, command: Command) -> Reply:
        """Get what another offered, from it."""
        caller = Caller(self._store, self._chains, 0)
        until = time.monotonic() + command.seconds
        while not (found := caller.read([_fresh(command.seed)])[0]) and time.monotonic() < until:
            time.sleep(0.05)
        return Reply(caller.counts, done=found)

    def read_disk(self, _: Command) -> Reply:
        """Get every block that the disk had when the store was opened, or has got since."""
        caller = Caller(self._store, self._chains, 0)
        caller.read(sorted(self._index.snapshot("disk")))
        return self._audited(caller.counts)

    def close(self, _: Command) -> Reply:
        """Close the store; the process ends after it."""
        self._store.close()
        return Reply()

    def _audited(self, counts: Counts) -> Reply:
        self._store.check()
        figures = flat(self._store.stats())
        figures["defects"] = self._defects.count
        figures["files"] = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not opened
        figures["threads"] = threading.active_count()
        return Reply(counts, figures)


def flat(stats: StoreStats) -> Figures:
    """Figures by name: those that the store's metrics show."""
    figures: Figures = {}
    for name, tier in stats.tiers.items():
        for kind in ("misses", "drops"):
            for reason, count in getattr(tier, kind).items():
                figures[f"{name}.{kind}.{reason}"] = count
        for kind in ("hits", "stores", "verify_failures", "evictions", "breaker_trips", "lost_slots", "damaged"):
            figures[f"{name}.{kind}"] = getattr(tier, kind)
    shared = stats.index
    assert shared is not None
    for group, counted in (("prefetch", stats.prefetches), ("served", stats.served), ("calls", shared.calls)):
        figures |= {f"{group}.{outcome}": count for outcome, count in counted.items()}
    figures |= {f"writer.{what}": count for what, count in shared.writer.items()}
    figures |= {"index.breaker_trips": shared.breaker_trips, "index.generation": shared.generation}
    return figures


def _fresh(number: int) -> BlockHash:
    return block_hash(IDENTITY.root(), [1 << 31, number])


def _config(settings: Settings) -> StoreConfig:
    faults = Faults(
        seed=settings.seed, delay=0.002, delay_s=0.05, short_read=0.002, bit_flip=0.004, misplaced=0.002,
        lost=0.002, full=0.002, io_error=0.002, stuck=0.0001, stuck_s=2.0,
    )  # fmt: skip
    return StoreConfig(
        BLOCK_BYTES,
        IDENTITY,
        host_bytes=HOST_BLOCKS * (BLOCK_BYTES + 1024),
        disk_bytes=DISK_BLOCKS * (BLOCK_BYTES + 4096 + 64) + (1 << 20),
        disk_dir=Path(settings.disk_dir),
        disk_free_floor_bytes=0,
        eviction="arc" if settings.number % 2 else "lru",
        disk_keys=KeyRing(1, {1: _KEY}) if settings.encrypted else None,
        disk_faults=faults if settings.faulty else None,
        peers=PeersConfig(_TOKEN, listen=f"{settings.host}:{PORT}", stall_s=0.3),
        read_threads=2,
        write_threads=1,
        deadlines=Deadlines(load_s=1.0, put_s=0.1, flush_s=SETTLE_S, close_s=10.0),
    )


def main() -> None:
    """Open, then do as told until told to close."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    disk_tier._SEGMENT_BYTES = SEGMENT_BYTES  # several files, so that growing meets the faults too

    def answer(reply: Reply) -> None:
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()

    try:
        worker = Worker(msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings))
        answer(worker.figures(Command("figures")))
        for line in sys.stdin.buffer:
            command = msgspec.json.decode(line, type=Command)
            answer(getattr(worker, command.name)(command))
            if command.name == "close":
                return
    except Exception as error:  # noqa: BLE001 - told to the driver, whatever it is
        _log.exception("the worker fails")
        answer(Reply(error=f"{type(error).__name__}: {error}", done=False))


if __name__ == "__main__":
    main()
