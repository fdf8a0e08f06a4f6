"""The faults that strike: what each does, how it ends, and which metrics must show it."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .ground import Clock, Network, RedisServer
from .process import WorkerProcess
from .worker import LEASE_S

REDIS = "redis"
WORKER = "worker"
SMALL = "small"
"""Where a kind strikes: Redis, any worker, or the worker whose file system is small."""

PAGE_BYTES = 4096
_FLIPS = 200
_PAGES = 40
_CLOCK_JUMP_S = 3600
_DAMAGE = ("disk.verify_failures", "disk.misses.header", "disk.misses.short_read", "disk.damaged")
_UNANSWERED = ("calls.failed",)
_ANEW = ("writer.resyncs",)

Heal = Callable[[], None]


@dataclass
class Ground:
    """All that faults can strike. ``small`` is the number of the worker whose file system is."""

    redis: RedisServer
    redis_clock: Clock
    network: Network
    workers: list[WorkerProcess]
    small: int = 0

    def restart(self, number: int) -> None:
        """A new life for a worker, after kill -9 if it is alive."""
        self.workers[number].kill()
        self.workers[number].start()

    def segments(self, number: int) -> list[Path]:
        """The segment files of a worker's disk, but for those of which an earlier fault has left next to nothing."""
        found = sorted(Path(self.workers[number].settings.disk_dir).glob("share-*/segment-*.kv"))
        return [path for path in found if path.stat().st_size >= 2 * PAGE_BYTES]


@dataclass(frozen=True)
class Kind:
    """One kind of fault. ``strike(ground, worker, random)`` returns what ends it. ``evidence``, ``certain``,
    ``anywhere``: as for `ledger.Strike`. ``least_s``: how long it must last. ``lacks``: why it is impossible here."""

    name: str
    site: str
    strike: Callable[[Ground, int, Random], Heal]
    evidence: Sequence[str]
    certain: bool = True
    anywhere: bool = False
    least_s: float = 0.0
    lacks: Callable[[Ground], str] = lambda ground: ""


def killed(ground: Ground, worker: int, _: Random) -> Heal:
    """kill -9; a new process on the same disk after a while."""
    ground.workers[worker].kill()
    return lambda: ground.restart(worker)


def frozen(ground: Ground, worker: int, _: Random) -> Heal:
    """SIGSTOP for longer than a lease: to the process, time makes a jump."""
    ground.workers[worker].signal(signal.SIGSTOP)
    return lambda: ground.workers[worker].signal(signal.SIGCONT)


def redis_frozen(ground: Ground, _: int, __: Random) -> Heal:
    """SIGSTOP."""
    ground.redis.signal(signal.SIGSTOP)
    return lambda: ground.redis.signal(signal.SIGCONT)


def redis_restarted(ground: Ground, _: int, __: Random) -> Heal:
    """kill -9 just after it saved."""
    ground.redis.save()
    ground.redis.kill()
    return ground.redis.start


def redis_rolled_back(ground: Ground, _: int, __: Random) -> Heal:
    """kill -9 some time after it saved: what it was told in between is lost."""
    ground.redis.save()
    time.sleep(0.3)
    ground.redis.kill()
    return ground.redis.start


def redis_wiped(ground: Ground, _: int, __: Random) -> Heal:
    """kill -9, and a start with nothing."""
    ground.redis.kill()
    ground.redis.forget()
    return ground.redis.start


def redis_clock(ground: Ground, _: int, __: Random) -> Heal:
    """An hour forward: all leases end; and back: they would last an hour."""
    ground.redis_clock.move(_CLOCK_JUMP_S)
    return lambda: ground.redis_clock.move(0)


def worker_clock(ground: Ground, worker: int, random: Random) -> Heal:
    """The wall clock, an hour forward or back. Nothing in the store goes by it, so nothing may show."""
    clock = ground.workers[worker].clock
    clock.move(random.choice((-1, 1)) * _CLOCK_JUMP_S)
    return lambda: clock.move(0)


def cut_off(ground: Ground, worker: int, _: Random) -> Heal:
    """The cable is pulled."""
    ground.network.cut(worker)
    return lambda: ground.network.join(worker)


def deafened(ground: Ground, worker: int, _: Random) -> Heal:
    """Everything that comes in is dropped without a word: connections stay, and stay silent."""
    ground.network.silence(worker)
    return lambda: ground.network.unsilence(worker)


def bits_flipped(ground: Ground, worker: int, random: Random) -> Heal:
    """Single bits anywhere in the segment files: payloads, headers, tables."""
    for path in ground.segments(worker):
        with path.open("r+b", buffering=0) as file:
            size = path.stat().st_size
            for _ in range(_FLIPS):
                at = random.randrange(size)
                byte = os.pread(file.fileno(), 1, at)
                if byte:
                    _overwrite(file.fileno(), bytes([byte[0] ^ 1 << random.randrange(8)]), at)
    return _perhaps_restart(ground, worker, random)


def pages_torn(ground: Ground, worker: int, random: Random) -> Heal:
    """Pages, or ends of pages, that hold nothing, all ones or garbage, as after torn and misdirected writes."""
    for path in ground.segments(worker):
        pages = path.stat().st_size // PAGE_BYTES
        with path.open("r+b", buffering=0) as file:
            for page in (0, 1, *(random.randrange(pages) for _ in range(_PAGES))):
                if page < 2 and random.random() < 0.7:
                    continue  # the pages that describe a file: not each time, or no file would be left to damage
                length = PAGE_BYTES - random.choice((0, random.randrange(PAGE_BYTES)))
                data = random.choice((bytes(length), b"\xff" * length, random.randbytes(length)))
                _overwrite(file.fileno(), data, (page + 1) * PAGE_BYTES - length)
        if random.random() < 0.3:
            books = path.with_name("share.json")
            os.truncate(books, books.stat().st_size // 2)
    return _perhaps_restart(ground, worker, random)


def cut_short(ground: Ground, worker: int, random: Random) -> Heal:
    """Each file loses its end."""
    for path in ground.segments(worker):
        os.truncate(path, random.randrange(path.stat().st_size // 2))
    return _perhaps_restart(ground, worker, random)


def disk_full(ground: Ground, worker: int, random: Random) -> Heal:
    """Others take all the space there is, that of its files' lost second halves included; perhaps it restarts."""
    filler = Path(ground.workers[worker].settings.disk_dir).parent / "filler"
    for path in ground.segments(worker):
        os.truncate(path, path.stat().st_size // 2)
    with filler.open("wb") as file:
        size, step = 0, 1 << 20
        while step >= PAGE_BYTES:
            try:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                step //= 2
    _perhaps_restart(ground, worker, random)()
    return filler.unlink


def _overwrite(descriptor: int, data: bytes, at: int) -> None:
    try:
        os.pwrite(descriptor, data, at)
    except OSError as error:
        if error.errno != errno.ENOSPC:  # a hole in a file of a full file system: there is nothing to damage
            raise


def _perhaps_restart(ground: Ground, worker: int, random: Random) -> Heal:
    """Half the time the process is killed and meets the damage as it opens its disk."""
    if random.random() < 0.5:
        return lambda: None
    return lambda: ground.restart(worker)


def _no_compiler(ground: Ground) -> str:
    return "" if ground.redis_clock.movable else "no C compiler for the clock"


KINDS = (
    Kind("process killed", WORKER, killed, ("index.generation",)),
    Kind("process frozen", WORKER, frozen, _ANEW, least_s=1.4 * LEASE_S),
    Kind("Redis frozen", REDIS, redis_frozen, _UNANSWERED, anywhere=True, least_s=1.4 * LEASE_S),
    Kind("Redis restarted", REDIS, redis_restarted, _UNANSWERED, anywhere=True),
    Kind("Redis rolled back", REDIS, redis_rolled_back, _ANEW, anywhere=True),
    Kind("Redis wiped", REDIS, redis_wiped, _ANEW, anywhere=True),
    Kind("Redis's clock jumps", REDIS, redis_clock, _ANEW, anywhere=True, lacks=_no_compiler),
    Kind("worker's clock jumps", WORKER, worker_clock, (), lacks=_no_compiler),
    Kind("network cut", WORKER, cut_off, _UNANSWERED),
    Kind(
        "network silent",
        WORKER,
        deafened,
        _UNANSWERED,
        lacks=lambda ground: "" if ground.network.can_be_silenced else "no nft on PATH",
    ),
    Kind("bits flipped", WORKER, bits_flipped, _DAMAGE, certain=False),
    Kind("pages torn", WORKER, pages_torn, _DAMAGE, certain=False),
    Kind("files cut short", WORKER, cut_short, _DAMAGE, certain=False),
    Kind("disk full", SMALL, disk_full, ("disk.drops.no_space", "disk.drops.full", "disk.drops.short_write"), False),
)
