"""Where the wire and the engine meet: leased lines go in, outcomes come out. The only state that both threads touch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from spillway.api.errors import LineError
from spillway.node_agent.lines import LineAnswer


@dataclass(frozen=True, slots=True)
class LeasedLine:
    """A line under a lease. `raw` is the request as it stands in the input; `job` is "jobs/{job}"."""

    lease: str
    job: str
    index: int
    raw: bytes
    response_id: str
    created: int
    line_number: int

    @property
    def key(self) -> tuple[str, int]:
        """Names the line among all that this agent ever holds: a line that comes back does so under another lease."""
        return (self.lease, self.index)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a line. `retryable` errors are worth another attempt."""

    line: LeasedLine
    result: LineAnswer | LineError
    retryable: bool = False


@dataclass(slots=True)
class DeskCounts:
    """What went over the desk since the start."""

    lines_taken: int = 0
    lines_answered: int = 0
    lines_failed: int = 0
    lines_dropped: int = 0
    """Lines and results thrown away because their lease was lost."""
    leases_lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Desk:
    """Thread-safe. A line is here from `put` until `settle` (reported), `drop` (lost) or `clear` (handed back)."""

    def __init__(self, max_lines: int, on_outcome: Callable[[], None]) -> None:
        """`on_outcome` is called, in the engine's thread, whenever there is something to report."""
        self.max_lines = max_lines
        self.counts = DeskCounts()
        self._on_outcome = on_outcome
        self._changed = threading.Condition()
        self._held: dict[tuple[str, int], LeasedLine] = {}
        self._incoming: deque[LeasedLine] = deque()
        self._unwanted: list[tuple[str, int]] = []
        self._outcomes: deque[Outcome] = deque()

    # the wire's side

    @property
    def room(self) -> int:
        """How many more lines may be leased."""
        with self._changed:
            return self.max_lines - len(self._held)

    @property
    def leases(self) -> list[str]:
        """Leases with lines that are not reported."""
        with self._changed:
            return list(dict.fromkeys(lease for lease, _ in self._held))

    def put(self, lines: list[LeasedLine]) -> None:
        """Takes in what was leased."""
        with self._changed:
            self.counts.lines_taken += len(lines)
            self._held.update((line.key, line) for line in lines)
            self._incoming.extend(lines)
            self._changed.notify()

    def outcomes(self, most: int) -> list[Outcome]:
        """Up to `most` outcomes to report, of one job and lease. They stay here until they are settled."""
        with self._changed:
            found: list[Outcome] = []
            for outcome in self._outcomes:
                if outcome.line.lease == self._outcomes[0].line.lease and len(found) < most:
                    found.append(outcome)
            return found

    def settle(self, outcomes: list[Outcome]) -> None:
        """The gateway has them, or does not want them."""
        settled = {outcome.line.key for outcome in outcomes}
        with self._changed:
            for key in settled:
                self._held.pop(key, None)
            self._outcomes = deque(each for each in self._outcomes if each.line.key not in settled)

    def drop(self, leases: list[str]) -> None:
        """These leases are lost: their lines belong to others, and what is known of them is nobody's business."""
        lost = set(leases)
        with self._changed:
            gone = [key for key in self._held if key[0] in lost]
            for key in gone:
                del self._held[key]
            self.counts.leases_lost += len(lost)
            self.counts.lines_dropped += len(gone)
            self._outcomes = deque(each for each in self._outcomes if each.line.lease not in lost)
            self._incoming = deque(each for each in self._incoming if each.lease not in lost)
            self._unwanted += gone
            self._changed.notify()

    # the engine's side

    def take(self, most: int, wait_s: float) -> list[LeasedLine]:
        """Up to `most` lines to run; waits for one, or for news of another kind, if there are none."""
        with self._changed:
            if not self._incoming and not self._unwanted and wait_s:
                self._changed.wait(wait_s)
            return [self._incoming.popleft() for _ in range(min(most, len(self._incoming)))]

    def unwanted(self) -> list[tuple[str, int]]:
        """Keys of lines to stop working on; told once."""
        with self._changed:
            keys, self._unwanted = self._unwanted, []
            return keys

    def finish(self, outcome: Outcome) -> None:
        """A line is done; not noted if its lease was lost meanwhile."""
        with self._changed:
            if outcome.line.key not in self._held:
                return
            self._outcomes.append(outcome)
            if isinstance(outcome.result, LineError):
                self.counts.lines_failed += 1
            else:
                self.counts.lines_answered += 1
                self.counts.prompt_tokens += outcome.result.prompt_tokens
                self.counts.completion_tokens += outcome.result.completion_tokens
        self._on_outcome()
