"""Which faults strike when and whom. Pure: a seed says it all."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .faults import REDIS, SMALL, Kind

Planned = tuple[Kind, int]
"""A fault and the number of the worker it strikes (-1: none)."""


def rounds(kinds: Sequence[Kind], workers: int, small: int, random: Random) -> list[list[Planned]]:
    """Enough rounds for every kind to strike once, up to two in a round, never two in one place."""
    deck = list(kinds)
    random.shuffle(deck)
    planned: list[list[Planned]] = []
    while deck:
        this_round: list[Planned] = []
        for kind in list(deck):
            taken = {worker for _, worker in this_round}
            free = [number for number in range(workers) if number not in taken]
            if kind.site == REDIS:
                free = [-1] if -1 not in taken else []
            elif kind.site == SMALL:
                free = [small] if small in free else []
            if free and len(this_round) < 2:
                this_round.append((kind, random.choice(free)))
                deck.remove(kind)
        planned.append(this_round)
    return planned
