"""Which lines of a job begin alike, findable by what they begin with: so that jobs which share documents can meet.

A family at a level is a run of neighbours in the job's order whose prompts agree up to that level's boundary. Its key
is the 32-bit hash of that beginning, the same in every job; a collision costs order, not correctness.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spillway.api.bodies import ChatBody, CompletionBody
from spillway.gateway.order import BOUNDARIES, prefix_keys, prompt_bytes

LEVELS = tuple(next(level for level, size in enumerate(BOUNDARIES) if size >= wanted) for wanted in (512, 2048, 8192))
"""Indices of the boundaries that families are kept for: about 128, 512 and 2048 tokens of English."""

Span = tuple[int, int]
"""Places [start, stop) in the order of a job."""
Families = npt.NDArray[np.uint32]
"""`[3, n]`: keys in ascending order, and where each family starts and stops in the order."""


def families(keys: npt.NDArray[np.uint32], reached: npt.NDArray[np.bool_]) -> Families:
    """Families of one level. `keys` `[lines]` in the order of the job; lines that are too short are not `reached`."""
    if len(keys) == 0:
        return np.zeros((3, 0), dtype=np.uint32)
    first = np.ones(len(keys), dtype=bool)
    first[1:] = (keys[1:] != keys[:-1]) | (reached[1:] != reached[:-1])
    starts = np.flatnonzero(first)
    stops = np.append(starts[1:], len(keys))
    kept = reached[starts]
    starts, stops = starts[kept], stops[kept]
    by_key = np.argsort(keys[starts], kind="stable")
    return np.stack([keys[starts][by_key], starts[by_key], stops[by_key]]).astype(np.uint32)


def find(level: Families, key: int) -> Span | None:
    """Where the family with this key stands, or None."""
    keys = level[0]
    place = int(np.searchsorted(keys, np.uint32(key)))
    if place == len(keys) or int(keys[place]) != key:
        return None
    return int(level[1, place]), int(level[2, place])


def beginnings(body: ChatBody | CompletionBody) -> Sequence[int]:
    """Keys of one prompt at each of LEVELS that it reaches, shortest first."""
    keys = prefix_keys(*prompt_bytes(body))
    return [keys[level] for level in LEVELS if level < len(keys) - 1]
