"""What a job of the service is doing."""

from __future__ import annotations

from enum import Enum, auto


class State(Enum):
    """Derived from the spec and from what goes on; never stored."""

    VALIDATING = auto()
    RUNNING = auto()
    PAUSED = auto()
    FINALIZING = auto()
    COMPLETED = auto()
    CANCELLED = auto()
    EXPIRED = auto()
    FAILED = auto()

    @property
    def final(self) -> bool:
        """Whether nothing will change any more."""
        return self.value >= State.COMPLETED.value
