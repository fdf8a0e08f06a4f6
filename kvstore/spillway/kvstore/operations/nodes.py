"""Talks to a living node's block server as its peers do: reads its blocks, or has it do something with them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType

from ..buffers import Bytes, aligned
from ..errors import NodeUnreachableError, PeerError, PeerRefusedError
from ..header import BlockHeader, checksum_of
from ..identity import BlockHash
from ..outcomes import MissReason
from ..peer.config import PeersConfig
from ..peer.links import Link, Peer
from ..peer.wire import MOST_BLOCKS, Refusal, Result, Verb
from .shared_index import Node

ORDER_S = 60.0
CHECKED_AT_ONCE = 32
"""Few enough that a node with a slow disk answers in time."""
_CURES = {
    Refusal.TOKEN: "it does not know our secret: give the agents' own --peer-token-file",
    Refusal.GENERATION: "it has just entered itself anew: try again",
    Refusal.BUSY: "it serves as many connections as it may: try again",
    Refusal.IDENTITY: "it has blocks of another model by now: try again",
}


class NodeCall:
    """One connection to a living node, in a ``with`` statement. All methods raise `NodeUnreachableError`."""

    def __init__(self, node: Node, peers: PeersConfig) -> None:
        """Connect. ``peers``: the secret, and TLS where the node speaks it."""
        self.node = node
        if not node.address or not node.about.identity:
            raise NodeUnreachableError(f"{node.name} serves no blocks to others: start it with --peer-listen")
        peer = Peer(node.name, node.generation, node.address)
        try:
            self._link = Link(peer, peers, bytes.fromhex(node.about.identity), time.monotonic() + ORDER_S)
        except (OSError, PeerError) as error:
            raise self._trouble(error) from error

    def order(self, verb: Verb, blocks: Sequence[BlockHash]) -> Iterator[tuple[BlockHash, Result]]:
        """Have the node do something with ``blocks``, portion by portion; what became of each."""
        most = CHECKED_AT_ONCE if verb is Verb.CHECK else MOST_BLOCKS
        for start in range(0, len(blocks), most):
            portion = blocks[start : start + most]
            try:
                results = self._link.order(verb, portion, time.monotonic() + ORDER_S)
            except (OSError, PeerError) as error:
                raise self._trouble(error) from error
            yield from zip(portion, results, strict=True)

    def read(self, blocks: Sequence[BlockHash]) -> Iterator[tuple[BlockHash, MissReason | None]]:
        """Load ``blocks`` over the network and verify what arrives; why a block did not, None if it is whole."""
        buffer = aligned(self.node.about.block_bytes)
        for start in range(0, len(blocks), CHECKED_AT_ONCE):
            portion = blocks[start : start + CHECKED_AT_ONCE]
            yield from zip(portion, self._read(portion, buffer), strict=True)

    def _read(self, blocks: Sequence[BlockHash], buffer: Bytes) -> list[MissReason | None]:
        identity = bytes.fromhex(self.node.about.identity)
        faults: list[MissReason | None] = []

        def arrived(position: int, answer: BlockHeader | MissReason) -> bool:
            if not isinstance(answer, BlockHeader):
                faults.append(answer)
            elif answer.block != blocks[position]:
                faults.append(MissReason.HEADER)
            elif answer.identity != identity:
                faults.append(MissReason.IDENTITY)
            elif checksum_of(buffer[: answer.stored_bytes]) != answer.checksum:
                faults.append(MissReason.CHECKSUM)
            else:
                faults.append(None)
            return True

        try:
            self._link.get(blocks, buffer, time.monotonic() + ORDER_S, arrived)
        except (OSError, PeerError) as error:
            raise self._trouble(error) from error
        return faults

    def __enter__(self) -> NodeCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()

    def _trouble(self, error: OSError | PeerError) -> NodeUnreachableError:
        what = str(error) or type(error).__name__
        if isinstance(error, PeerRefusedError):
            what = _CURES.get(Refusal(error.code), what) if error.code in list(Refusal) else what
        return NodeUnreachableError(f"{self.node.name} at {self.node.address}: {what}")
