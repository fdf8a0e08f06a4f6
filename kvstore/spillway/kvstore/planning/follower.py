"""The engine's side of a plan: what it tells the store as its job goes on, and what the store makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..eviction.next_use import NextUse
from ..identity import BlockHash
from .prefetch import Prefetcher
from .uses import NextUses, Use


class Follower:
    """Keeps the eviction policies and the prefetches of a store in step with an engine. For the engine's thread alone.

    Without a plan (None) nothing is known: all calls are then allowed, and change nothing.
    ``held``: whether the tier right below the device has a block. ``stored``: whether any tier has.
    """

    def __init__(
        self,
        uses: NextUses,
        policies: Sequence[NextUse],
        prefetcher: Prefetcher | None,
        held: Callable[[BlockHash], bool],
        stored: Callable[[BlockHash], bool],
    ) -> None:
        self._uses = uses
        self._policies = policies
        self._prefetcher = prefetcher
        self._held = held
        self._stored = stored
        self.spared = 0
        """Blocks that the device let go of without a copy, since nobody will read them again."""

    @property
    def lines(self) -> int:
        """How many lines were announced: the next one gets this number."""
        return self._uses.plan.lines if self._uses.plan is not None else 0

    @property
    def whole(self) -> bool:
        """Whether the plan knows all that will be needed: then it pays to let the device keep what it has."""
        return self._uses.plan is not None and self._uses.plan.whole

    @whole.setter
    def whole(self, whole: bool) -> None:
        if self._uses.plan is not None and self._uses.plan.whole != whole:
            self._uses.plan.whole = whole
            self.rekey_all()

    def announce(self, chain: Sequence[BlockHash]) -> None:
        """A further line will come, after all that were announced. ``chain``: its blocks, first block first."""
        if self._uses.plan is not None:
            self._rekey(self._uses.plan.append(chain))

    def advance(self, position: int) -> None:
        """All lines before ``position`` have begun: what the next ones need is fetched ahead of need."""
        if self._uses.plan is None:
            return
        begun = position - self._uses.plan.position
        self._rekey(self._uses.plan.advance(position))
        if self._prefetcher is not None:
            self._prefetcher.look_ahead(max(0, begun))

    def expect(self, chain: Sequence[BlockHash]) -> None:
        """A sequence was preempted and needs ``chain`` again soon, whatever the plan says. `met` takes it back."""
        if self._uses.plan is not None:
            self._uses.expect(chain)
            self._rekey(chain)

    def met(self, chain: Sequence[BlockHash]) -> None:
        """What was expected has come, or will not be asked for."""
        self._uses.met(chain)
        self._rekey(chain)

    def took(self, blocks: Sequence[BlockHash]) -> None:
        """The device has ``blocks`` now: where they are needed again, host memory gives up its copies first.

        `lets_go` must be told of each of them.
        """
        self._uses.took(blocks)
        self._rekey(blocks)

    def lets_go(self, block: BlockHash) -> bool:
        """The device gives ``block`` up; whether it should put it into the store before."""
        self._uses.let_go((block,))
        self._rekey((block,))
        use = self._uses.next_use(block)
        if use is Use.NEVER:
            self.spared += 1
            return False
        return not (self._stored(block) if use is Use.UNKNOWN else self._held(block))

    def needs(self, block: BlockHash) -> bool:
        """Whether ``block`` is known to be needed again. True without a plan."""
        return self._uses.plan is None or not isinstance(self._uses.next_use(block), Use)

    def rekey_all(self) -> None:
        """The next use of any block may have changed."""
        for policy in self._policies:
            policy.rekey(policy.blocks())

    def _rekey(self, blocks: Iterable[BlockHash]) -> None:
        for policy in self._policies:
            policy.rekey(blocks)
