"""The interface of a codec."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..buffers import Bytes


class Codec(ABC):
    """Turns a block's bytes into fewer. Lossy codecs are off unless asked for. Thread-safe.

    ``number`` stands in every header, so that bytes are never decoded by another codec than they were encoded with.
    """

    number: int

    @abstractmethod
    def stored_bytes(self, raw_bytes: int) -> int:
        """Length of the encoding of ``raw_bytes`` bytes. Raises `ConfigError` if the codec cannot take such a block."""

    @abstractmethod
    def encode(self, raw: Bytes, out: Bytes) -> None:
        """Encode a block into ``out``, which has exactly `stored_bytes`."""

    @abstractmethod
    def decode(self, coded: Bytes, out: Bytes) -> None:
        """Decode into ``out``, as long as the block. Any bytes decode to something: verify them before."""
