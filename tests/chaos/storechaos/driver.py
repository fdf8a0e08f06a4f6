"""One run, inside its walls: workers under load, rounds of faults, then peace, and the audit.

python -m storechaos.driver PLAN.json REPORT.json
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from random import Random

import msgspec

from . import schedule
from .faults import KINDS, SMALL, WORKER, Ground, Heal, Kind
from .ground import REDIS_HOST, REDIS_PORT, Clock, Network, RedisServer, run
from .ledger import Books, Counts, Figures, Findings, Lease, SharedIndex, Strike, stray_entries
from .process import WorkerProcess
from .worker import LEASE_S, Command, Reply, Settings

SMALL_DISK_BYTES = 9 << 20
_CLEANED_S = 60.0
_FETCH_S = 90.0
"""A peer that was away for long is asked again after a pause of a minute at most."""


class Plan(msgspec.Struct, frozen=True):
    """``directory``: for everything the run writes. Faults go on, each kind as often as any other, until there have
    been ``operations`` or ``most_s`` seconds have passed."""

    seed: int
    operations: int
    workers: int
    round_s: float
    most_s: float
    directory: str


class Seen(msgspec.Struct, frozen=True):
    """A kind of fault in the report. ``shown``: strikes after which a metric had grown; None if none has to."""

    kind: str
    strikes: int
    shown: int | None
    by: list[str]
    left_out: str = ""


class Report(msgspec.Struct, frozen=True):
    """What came of it. ``violations`` is empty if the store kept its word. ``survivors``: blocks read from disks after
    all processes had been killed; ``entries``: places in the index at the end, each of them right."""

    seed: int
    rounds: int
    seconds: float
    counts: Counts
    faults: list[Seen]
    violations: list[str]
    survivors: int
    entries: int
    cleaned_s: float
    figures: Figures


class Run:
    """A run in progress."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = Random(plan.seed)
        self.books = Books()
        self.findings = Findings()
        self.round = 0
        self.entries = self.survivors = 0
        self.cleaned_s = 0.0
        self.ground = self._build(Path(plan.directory))
        self.usable = [kind for kind in KINDS if not kind.lacks(self.ground)]

    def go(self) -> Report:
        """Everything, in order."""
        start = time.monotonic()
        for worker in self.ground.workers:
            worker.start()
        for worker in self.ground.workers:
            self._take(worker, worker.reply())
        self._ask("burst", seed=self.plan.seed, seconds=self.plan.round_s)  # so that there is something to damage
        while not self.round or not self._enough(time.monotonic() - start):
            for planned in schedule.rounds(self.usable, self.plan.workers, self.ground.small, self.random):
                self._play(planned)
        self._make_peace()
        self._exchange()
        self._lose_a_node()
        self._read_after_the_end()
        self._close_windows(everything=True)
        return self._report(time.monotonic() - start)

    def _enough(self, seconds: float) -> bool:
        return self.findings.counts.operations >= self.plan.operations or seconds >= self.plan.most_s

    def _build(self, directory: Path) -> Ground:
        network = Network()
        redis_clock = Clock(directory, "redis")
        redis = RedisServer(directory / "redis", redis_clock)
        redis.start()
        workers = []
        for number in range(self.plan.workers):
            network.add(number)
            home = directory / f"worker-{number}"
            home.mkdir()
            if number == 0:
                run("mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(home))
            settings = Settings(
                number=number,
                node=f"worker-{number}",
                host=network.address(number),
                redis_url=f"redis://{REDIS_HOST}:{REDIS_PORT}/0",
                disk_dir=str(home / "disk"),
                seed=self.plan.seed * 100 + number,
                faulty=number == 1,
                encrypted=number == 2,
            )
            clock = Clock(directory, f"worker-{number}")
            workers.append(WorkerProcess(settings, network, clock, directory / f"worker-{number}.log"))
        return Ground(redis, redis_clock, network, workers)

    def _play(self, planned: list[schedule.Planned]) -> None:
        """One round: all workers under load while its faults strike, and end before the load does."""
        self.round += 1
        for worker in self.ground.workers:
            if worker.fallen:
                worker.start()
                self._take(worker, worker.reply())
        least_s = max([self.plan.round_s, *(kind.least_s / 0.5 for kind, _ in planned)])
        for worker in self.ground.workers:
            worker.send(Command("burst", self.random.randrange(1 << 30), least_s))
        time.sleep(0.2 * least_s)
        healing: list[Heal] = []
        for kind, number in planned:
            worker = number if kind.site in (WORKER, SMALL) else None
            strike = Strike(kind.name, worker, self.round, kind.evidence, kind.anywhere, kind.certain)
            strike.before = strike.sum(self.books)
            self.findings.strikes.append(strike)
            healing.append(self._strike(kind, number, 0.6 * least_s))
        time.sleep(0.55 * least_s)
        for heal in healing:
            heal()
        for worker in self.ground.workers:
            self._take(worker, worker.reply())  # of the load, or of a new life that its store is open
        self._close_windows(everything=False)

    def _strike(self, kind: Kind, number: int, rest_s: float) -> Heal:
        """Let a fault strike. A worker that it restarted is under load again."""
        lives = [worker.life for worker in self.ground.workers]
        heal = kind.strike(self.ground, number, self.random)
        for worker, life in zip(self.ground.workers, lives, strict=True):
            if worker.life != life:
                self._take(worker, worker.reply())
                worker.send(Command("burst", self.random.randrange(1 << 30), rest_s))
        return heal

    def _take(self, worker: WorkerProcess, reply: Reply | None) -> None:
        """Enter a reply."""
        if reply is None:
            return
        if reply.error:
            self.findings.defects.append(f"round {self.round}, {worker.settings.node}: {reply.error}")
        self.findings.counts.add(reply.counts)
        if reply.figures:
            self.books.enter(worker.settings.number, worker.life, reply.figures)
            if reply.figures.get("defects"):
                self.findings.defects.append(f"{worker.settings.node} logged errors: see {worker.log.name}")

    def _close_windows(self, *, everything: bool) -> None:
        """What a strike did must show by the end of the next round; damage on a disk, once it has been read."""
        for strike in self.findings.strikes:
            if everything or strike.round >= self.round - 1:
                strike.after = max(strike.after, strike.sum(self.books))

    def _ask(self, name: str, *, seed: int = 0, seconds: float = 0.0) -> list[tuple[WorkerProcess, Reply]]:
        """Have all living workers do something at once."""
        living = [worker for worker in self.ground.workers if worker.alive]
        for worker in living:
            worker.send(Command(name, seed, seconds))
        answered = []
        for worker in living:
            reply = worker.reply()
            self._take(worker, reply)
            if reply is not None:
                answered.append((worker, reply))
        return answered

    def _make_peace(self) -> None:
        """No more faults: everything under way must come to rest. What was damaged on disks is read."""
        self._ask("heal")
        self._ask("read_disk")
        for worker, reply in self._ask("settle"):
            if not reply.done:
                self.findings.leaks.append(f"{worker.settings.node} does not come to rest")

    def _exchange(self) -> None:
        """After all that, each must load from each: a fresh block, put by one, got by all others."""
        for number, giver in enumerate(self.ground.workers):
            offered = giver.ask("offer", seed=number)
            self._take(giver, offered)
            for taker in self.ground.workers:
                if taker is giver:
                    continue
                reply = taker.ask("fetch", seed=number, seconds=_FETCH_S)
                self._take(taker, reply)
                if reply is None or not reply.done:
                    self.findings.defects.append(
                        f"{taker.settings.node} cannot load from {giver.settings.node} after all is healed"
                    )

    def _lose_a_node(self) -> None:
        """A node dies for good: its entries must go, and all others be right."""
        lost = self.ground.workers[-1]
        lost.kill()
        start = time.monotonic()
        self._ask("settle")
        while True:
            held = {
                worker.settings.node: {bytes.fromhex(block): bits for block, bits in reply.held.items()}
                for worker, reply in self._ask("held")
            }
            index = self._index()
            stray = stray_entries(index, held)
            if not stray or time.monotonic() - start > _CLEANED_S:
                break
            time.sleep(LEASE_S / 4)
        self.cleaned_s = time.monotonic() - start
        self.findings.leaks += stray
        self.entries = sum(1 for _ in index.places())

    def _index(self) -> SharedIndex:
        leases: dict[int, Lease] = {}
        entries: dict[bytes, bytes] = {}
        with self.ground.redis.client() as client:
            for key in client.scan_iter("*", count=1000):
                if key.endswith(b":leases"):
                    for number, lease in client.hgetall(key).items():
                        generation, _, _, node, *_ = lease.decode().split("|")
                        leases[int(number)] = Lease(node, int(generation))
                elif b":b:" in key:
                    entries |= {mark + entry[:24]: entry[24:] for mark, entry in client.hgetall(key).items()}
        return SharedIndex(leases, entries)

    def _read_after_the_end(self) -> None:
        """kill -9 all of them; what their disks still hold must be right, and the books of the new lives in order."""
        for worker in self.ground.workers:
            worker.kill()
        for worker in self.ground.workers:
            worker.start()
        for worker in self.ground.workers:
            self._take(worker, worker.reply())
        self._ask("heal")
        for _, reply in self._ask("read_disk"):
            self.survivors += reply.counts.hits
        self._make_peace()
        for worker, _ in self._ask("close"):
            worker.end()
            if worker.exit_code:
                self.findings.defects.append(f"{worker.settings.node} ended with {worker.exit_code}")

    def _report(self, seconds: float) -> Report:
        seen = []
        for kind in KINDS:
            strikes = [strike for strike in self.findings.strikes if strike.kind == kind.name]
            shown = sum(strike.seen for strike in strikes) if kind.evidence else None
            seen.append(Seen(kind.name, len(strikes), shown, list(kind.evidence), kind.lacks(self.ground)))
        return Report(
            seed=self.plan.seed,
            rounds=self.round,
            seconds=seconds,
            counts=self.findings.counts,
            faults=seen,
            violations=self.findings.violations(),
            survivors=self.survivors,
            entries=self.entries,
            cleaned_s=self.cleaned_s,
            figures=self.books.totals(),
        )


def main() -> None:
    """Run a plan and write its report; a failure of the run itself is a violation too."""
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)
    started: Run | None = None
    try:
        started = Run(plan)
        report = started.go()
    except Exception:
        if started is None:
            raise
        started.findings.defects.append(f"the run broke off: {traceback.format_exc()}")
        report = started._report(0.0)
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(report))


if __name__ == "__main__":
    main()
