"""Blocks of other nodes as a tier: located through the index, fetched over `links`, believed only once verified."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from ..buffers import Bytes
from ..errors import PeerError, PeerRefusedError
from ..header import BlockHeader
from ..identity import BlockHash
from ..index.base import PEER, BlockIndex, Location
from ..outcomes import MissReason, StoreOutcome
from ..tiers.base import Tier, TierUsage
from .config import PeersConfig
from .links import Arrived, LinkPool, Peer
from .wire import MOST_BLOCKS, Refusal

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_ABSENT_S = 5.0
"""For so long an entry is not believed whose block was not there: the index may lag behind its owner."""
_BAD_S = 300.0
_MOST_DOUBTS = 1 << 16
_MOST_PEERS = 256
_FATAL = frozenset({Refusal.TOKEN, Refusal.IDENTITY, Refusal.GENERATION, Refusal.VERSION})


class PeerTier(Tier):
    """Loads only. `store` accepts nothing: putting a block into another node's memory is lending, which needs a ledger.

    An entry whose block was absent or damaged is doubted, and not asked for again for a while; of damage its owner is
    told, who verifies its copy and withdraws it if it is bad. Each peer has a breaker of its own.
    """

    def __init__(self, config: PeersConfig, identity: bytes, index: BlockIndex, patience_s: float) -> None:
        """``patience_s``: how long a single `load` may take; `load_each` is told a deadline."""
        self.name = PEER
        self._index = index
        self._patience_s = patience_s
        self._links = LinkPool(config, identity)
        self._lock = threading.Lock()
        self._doubts: OrderedDict[tuple[Peer, BlockHash], float] = OrderedDict()
        self._reports: dict[Peer, list[BlockHash]] = {}
        self._asked: dict[BlockHash, Peer] = {}

    def store(self, header: BlockHeader, stored: Bytes) -> StoreOutcome:  # noqa: ARG002 - whatever it is
        """See `Tier.store`: nothing is accepted."""
        return StoreOutcome.NOT_ACCEPTED

    def load(self, block: BlockHash, out: Bytes) -> BlockHeader | MissReason:
        """See `Tier.load`."""
        answers: list[BlockHeader | MissReason] = []

        def arrived(_: int, answer: BlockHeader | MissReason) -> bool:
            answers.append(answer)
            return True

        self.load_each((block,), out, time.monotonic() + self._patience_s, arrived)
        return answers[0]

    def load_each(self, blocks: Sequence[BlockHash], buffer: Bytes, deadline: float, arrived: Arrived) -> None:
        """Load ``blocks``, one request per peer and `MOST_BLOCKS`, streamed one after the other into ``buffer``.

        ``arrived`` is told of each block once, in the caller's thread, while its bytes lie at the start of ``buffer``;
        after it returned False, of none. A broken connection is opened again, for what had not arrived.
        """
        groups: dict[Peer, list[int]] = {}
        for position, peer in enumerate(self._peers_of(blocks)):
            if peer is not None:
                groups.setdefault(peer, []).append(position)
            elif not arrived(position, MissReason.ABSENT):
                return
        for peer, positions in groups.items():
            for start in range(0, len(positions), MOST_BLOCKS):
                asked = [(position, blocks[position]) for position in positions[start : start + MOST_BLOCKS]]
                if not self._load_from(peer, asked, buffer, deadline, arrived):
                    return

    def contains(self, block: BlockHash) -> bool:
        """See `Tier.contains`: whether some peer is said to hold it, and not in doubt."""
        return self.holds((block,))[0]

    def holds(self, blocks: Sequence[BlockHash]) -> list[bool]:
        """`contains` of many blocks."""
        return [peer is not None for peer in self._peers_of(blocks)]

    def drop(self, block: BlockHash) -> bool:
        """Doubt the entry that ``block`` was last loaded from, and tell its owner with the next request."""
        with self._lock:
            peer = self._asked.pop(block, None)
            if peer is None:
                return False
            self._reports.setdefault(peer, []).append(block)
        self._doubt(peer, block, _BAD_S)
        return True

    def usage(self) -> TierUsage:
        """See `Tier.usage`: it takes no memory of this node."""
        return TierUsage(total=0, free=0, used=0, pinned=0)

    def check(self) -> None:
        """See `Tier.check`: there are no books to hold against each other."""

    def close(self) -> None:
        """See `Tier.close`."""
        self._links.close()

    def connections(self) -> tuple[int, int]:
        """Connections idle and in use."""
        return self._links.counts()

    def _peers_of(self, blocks: Sequence[BlockHash]) -> list[Peer | None]:
        """The nearest peer that is said to hold each block; one that is down only where no other has it."""
        places = self._index.locate(blocks)
        return [self._choose(block, locations) for block, locations in zip(blocks, places, strict=True)]

    def _choose(self, block: BlockHash, locations: Sequence[Location]) -> Peer | None:
        down: Peer | None = None
        for location in locations:
            if not location.node or not location.address:
                continue
            peer = Peer(location.node, location.generation, location.address)
            if self._doubted(peer, block):
                continue
            if self._links.breaker(peer).available:
                return peer
            down = down or peer
        return down

    def _load_from(
        self, peer: Peer, asked: list[tuple[int, BlockHash]], buffer: Bytes, deadline: float, arrived: Arrived
    ) -> bool:
        """Load from one peer; False if ``arrived`` stopped it."""
        done = 0
        goes_on = True

        def one(position: int, answer: BlockHeader | MissReason) -> bool:
            nonlocal done, goes_on
            number, block = asked[base + position]
            done += 1
            self._note(peer, block, answer)
            goes_on = arrived(number, answer)
            with self._lock:
                self._asked.pop(block, None)
            return goes_on

        breaker = self._links.breaker(peer)
        reason = MissReason.BREAKER
        for _ in range(_ATTEMPTS):
            if not breaker.allow():
                break
            base = done
            try:
                self._request(peer, [block for _, block in asked[done:]], buffer, deadline, one)
            except PeerRefusedError as error:
                breaker.failure()
                reason = MissReason.REFUSED
                _log.warning("%s at %s: %s", peer.node, peer.address, error)
                if error.code in _FATAL:
                    break
            except (OSError, PeerError) as error:
                breaker.failure()
                reason = MissReason.DEADLINE if time.monotonic() >= deadline else MissReason.UNREACHABLE
                _log.debug("%s at %s: %s", peer.node, peer.address, error)
            else:
                breaker.success()
                return goes_on
            if time.monotonic() >= deadline:
                break
        return all(arrived(number, reason) for number, _ in asked[done:])

    def _request(self, peer: Peer, blocks: list[BlockHash], buffer: Bytes, deadline: float, arrived: Arrived) -> None:
        link = self._links.take(peer, deadline)
        try:
            usable = link.get(blocks, buffer, deadline, arrived)
            for block in self._take_reports(peer):
                link.report(block)
        except BaseException:
            self._links.discard(peer, link)
            raise
        if usable:
            self._links.give(peer, link)
        else:
            self._links.discard(peer, link)

    def _take_reports(self, peer: Peer) -> list[BlockHash]:
        with self._lock:
            return self._reports.pop(peer, [])

    def _note(self, peer: Peer, block: BlockHash, answer: BlockHeader | MissReason) -> None:
        if isinstance(answer, BlockHeader):
            with self._lock:
                self._asked[block] = peer
        elif answer is not MissReason.DEADLINE:
            self._doubt(peer, block, _ABSENT_S)

    def _doubt(self, peer: Peer, block: BlockHash, seconds: float) -> None:
        with self._lock:
            self._doubts[(peer, block)] = time.monotonic() + seconds
            self._doubts.move_to_end((peer, block))
            while len(self._doubts) > _MOST_DOUBTS:
                self._doubts.popitem(last=False)

    def _doubted(self, peer: Peer, block: BlockHash) -> bool:
        if not self._doubts:
            return False
        with self._lock:
            until = self._doubts.get((peer, block))
            if until is not None and until <= time.monotonic():
                del self._doubts[(peer, block)]
                return False
            return until is not None
