"""What a node says of itself in the index: for people who ask, not for look-ups."""

from __future__ import annotations

import msgspec


class About(msgspec.Struct, frozen=True):
    """``identity``: digest of the blocks' identity, hex; ``weights``, ``dtype``, ``rank``: what people know of it.

    ``block_bytes``: one block on the device. ``metrics``: ``host:port`` of the page for Prometheus, empty if there is
    none.
    """

    identity: str = ""
    weights: str = ""
    dtype: str = ""
    rank: str = ""
    block_bytes: int = 0
    metrics: str = ""

    def pack(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def unpack(cls, data: bytes) -> About:
        """From JSON; empty if it is none of ours: nobody's work may hang on it."""
        try:
            return msgspec.json.decode(data, type=cls)
        except msgspec.DecodeError:
            return cls()
