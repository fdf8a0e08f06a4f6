"""What can come of asking a tier: names that are counted, shown and decided on."""

from __future__ import annotations

from enum import StrEnum


class MissReason(StrEnum):
    """Why a load gave no block."""

    ABSENT = "absent"
    HEADER = "header"
    IDENTITY = "identity"
    LENGTH = "length"
    CHECKSUM = "checksum"
    CODEC = "codec"
    KEY = "key"
    SHORT_READ = "short_read"
    IO_ERROR = "io_error"
    DEADLINE = "deadline"
    BREAKER = "breaker"
    CANCELLED = "cancelled"
    NO_ROOM = "no_room"
    INTERNAL = "internal"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"

    @property
    def damaged(self) -> bool:
        """Whether the entry that was found is no good and has to be withdrawn."""
        return self in _DAMAGED


_DAMAGED = frozenset(
    {
        MissReason.HEADER,
        MissReason.IDENTITY,
        MissReason.LENGTH,
        MissReason.CHECKSUM,
        MissReason.CODEC,
        MissReason.KEY,
        MissReason.SHORT_READ,
        MissReason.IO_ERROR,
    }
)


class StoreOutcome(StrEnum):
    """What became of a block handed to a tier. All but the first two are drops."""

    STORED = "stored"
    PRESENT = "present"
    FULL = "full"
    NO_SPACE = "no_space"
    SHORT_WRITE = "short_write"
    IO_ERROR = "io_error"
    BREAKER = "breaker"
    DAMAGED = "damaged"
    NOT_NEEDED = "not_needed"
    NOT_ACCEPTED = "not_accepted"

    @property
    def held(self) -> bool:
        """Whether the tier holds the block now."""
        return self in (StoreOutcome.STORED, StoreOutcome.PRESENT)

    @property
    def trouble(self) -> bool:
        """Whether the device, not its fill, is the cause."""
        return self in (StoreOutcome.SHORT_WRITE, StoreOutcome.IO_ERROR)
