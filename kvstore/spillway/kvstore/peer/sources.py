"""What a node serves to its peers: the blocks of its own tiers, in the form of its host tier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..buffers import Bytes, ThreadBuffer, round_up
from ..header import BlockHeader
from ..identity import BlockHash
from ..outcomes import MissReason
from ..tiers.host import HostTier
from ..transfer.lane import Lane


@dataclass(frozen=True, slots=True)
class Found:
    """A block ready to be sent: ``stored`` stays as it is until the context that gave it ends."""

    header: BlockHeader
    stored: Bytes


class Sources:
    """Host memory first, where a block is sent from its slot; then disk, whose bytes are verified before they leave.

    Ciphers and codecs of the disk end here: what travels is what the host tier would hold. Thread-safe.
    """

    def __init__(self, host: Lane, held: HostTier, disk: Lane | None) -> None:
        self._host = host
        self._held = held
        self._disk = disk
        longest = max(host.sealer.stored_bytes, disk.sealer.stored_bytes if disk else 0)
        self._fetched = ThreadBuffer(round_up(longest))
        self._raw = ThreadBuffer(host.sealer.raw_bytes)
        self._sealed = ThreadBuffer(round_up(host.sealer.stored_bytes))

    @property
    def most_bytes(self) -> int:
        """The longest stored form of a block."""
        return self._host.sealer.stored_bytes

    @contextmanager
    def find(self, block: BlockHash) -> Iterator[Found | MissReason]:
        """The block, held in place until the context ends; or why there is none."""
        with self._held.pinned(block) as pinned:
            if pinned is not None:
                yield Found(pinned.header, pinned.padded[: pinned.header.stored_bytes])
                return
        yield self._from_disk(block)

    def recheck(self, block: BlockHash) -> None:
        """A peer says that ``block`` is damaged: verify our copies, and withdraw those that are."""
        for lane in (self._host, self._disk):
            if lane is not None and lane.tier.contains(block):
                lane.fetch(block, self._fetched.bytes)

    def _from_disk(self, block: BlockHash) -> Found | MissReason:
        disk = self._disk
        if disk is None or not disk.tier.contains(block):
            return MissReason.ABSENT
        if not disk.breaker.allow():
            return MissReason.BREAKER
        fetched = self._fetched.bytes
        header = disk.fetch(block, fetched)
        if not isinstance(header, BlockHeader):
            return header
        if disk.sealer.same_form(self._host.sealer):
            return Found(header, fetched[: header.stored_bytes])
        raw = self._raw.bytes
        failure = disk.unseal(header, fetched, raw)
        if failure is not None:
            return failure
        if self._host.sealer.plain:
            return Found(self._host.sealer.seal_plain(block, raw), raw)
        sealed = self._sealed.bytes
        header = self._host.sealer.seal(block, raw, sealed)
        return Found(header, sealed[: header.stored_bytes])
