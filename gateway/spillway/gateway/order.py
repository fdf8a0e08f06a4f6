"""Order of the lines of a file that puts those with the longest common prompt prefix side by side.

The aim is the depth-first order of the prefix tree over all prompts, without the tree: it would need the whole text in
memory. Each prompt is hashed as a chain, and the hash is noted at boundaries that grow by a quarter each (64 bytes to
8 MiB). Two prompts agree at a boundary exactly if they share that prefix (a 32-bit collision costs order, not
correctness), so refining groups boundary by boundary walks the tree at that resolution: of the prefix that two lines
share, at most a fifth is overlooked, and never more than lies beyond the first 64 bytes, about one token block.

Among branches, and among lines of one prompt, the one with the longest answer goes first: a long answer that starts
last leaves the machine to itself at the end (longest processing time first, Graham 1969).
"""

from __future__ import annotations

from array import array
from itertools import chain
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from spillway.api.bodies import ChatBody, CompletionBody

_FIRST_BOUNDARY_BYTES = 64
_LAST_BOUNDARY_BYTES = 8 * 1024 * 1024
_MASK = 0xFFFFFFFF


def _boundaries() -> tuple[int, ...]:
    sizes = [_FIRST_BOUNDARY_BYTES]
    while sizes[-1] < _LAST_BOUNDARY_BYTES:
        sizes.append(sizes[-1] * 5 // 4)
    return tuple(sizes)


BOUNDARIES = _boundaries()
"""Prefix lengths in bytes at which prompts are compared."""

_TEXT_SEED, _TOKEN_SEED, _CHAT_SEED = 1, 2, 3
"""Prompts of different kinds never share KV by their bytes, so their hashes start apart."""


def prompt_bytes(body: ChatBody | CompletionBody) -> tuple[int, bytes]:
    """(seed, bytes): the prompt as one byte string in which equal prefixes mean equal prompt prefixes."""
    if isinstance(body, ChatBody):
        parts = [repr(sorted(body.chat_template_kwargs.items()))] if body.chat_template_kwargs else []
        for message in body.messages:
            parts += (f"\x1e{message.role}\x1f{message.name or ''}\x1f", message.text)
        return _CHAT_SEED, "".join(parts).encode("utf-8")
    prompts = body.prompts
    if isinstance(prompts[0], str):
        return _TEXT_SEED, "\x1e".join(prompts).encode("utf-8")
    return _TOKEN_SEED, array("i", chain.from_iterable(prompts)).tobytes()


def most_tokens(body: ChatBody | CompletionBody) -> int:
    """The most that a line may generate in one sequence; a line that sets no limit may fill the context."""
    return _MASK if body.max_new_tokens is None else body.max_new_tokens


def prefix_keys(seed: int, prompt: bytes) -> array[int]:
    """32-bit hashes of the prompt's prefixes at each boundary within it, and of the whole at the end."""
    state = xxhash.xxh3_64(seed=seed)
    view = memoryview(prompt)
    keys, done = array("I"), 0
    for boundary in BOUNDARIES:
        if boundary > len(prompt):
            break
        state.update(view[done:boundary])
        done = boundary
        keys.append(state.intdigest() & _MASK)
    state.update(view[done:])
    state.update(b"end")
    keys.append(state.intdigest() & _MASK)
    return keys


class PrefixOrder:
    """Collects keys line by line into a file, then orders.

    Memory: 5 bytes a line while collecting; while ordering about 70, and the keys as far as the kernel keeps them.
    """

    def __init__(self, scratch: BinaryIO) -> None:
        """`scratch`: an empty file open for reading and writing; gets 4 bytes per boundary that a prompt reaches."""
        self._scratch = scratch
        self._levels = array("B")
        self._answers = array("I")

    def add(self, seed: int, prompt: bytes, answer_tokens: int = 0) -> None:
        """Takes in the next line. `answer_tokens`: the most that it may generate."""
        keys = prefix_keys(seed, prompt)
        self._answers.append(min(answer_tokens, _MASK))
        self._scratch.write(keys.tobytes())
        self._levels.append(len(keys))

    def order(self) -> npt.NDArray[np.uint32]:
        """Numbers of the lines added, counted from 0, in depth-first order of the prefix tree: `[lines] uint32`.

        Siblings and equal prompts stand by their longest answer, longest first, else in order of the file.
        """
        levels = np.frombuffer(self._levels, dtype=np.uint8)
        if len(levels) == 0:
            return np.zeros(0, dtype=np.uint32)
        self._scratch.flush()
        keys = np.memmap(self._scratch, dtype=np.uint32, mode="r")
        starts = np.cumsum(levels, dtype=np.int64) - levels
        answers = np.frombuffer(self._answers, dtype=np.uint32).astype(np.int64)
        longest_first = np.argsort(-answers, kind="stable").astype(np.uint32)
        return longest_first[_refine(keys, starts[longest_first], levels[longest_first])]

    def keys_at(
        self, level: int, lines: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Keys `[lines]` of the numbered lines at a boundary, and which of them reach it (the others have key 0)."""
        levels = np.frombuffer(self._levels, dtype=np.uint8)
        found = np.zeros(len(lines), dtype=np.uint32)
        reached: npt.NDArray[np.bool_] = levels[lines] > level + 1  # the last key is that of the whole prompt
        if reached.any():
            self._scratch.flush()
            keys = np.memmap(self._scratch, dtype=np.uint32, mode="r")
            starts = np.cumsum(levels, dtype=np.int64) - levels
            found[reached] = keys[starts[lines[reached]] + level]
        return found, reached


def _refine(
    keys: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64], levels: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint32]:
    """Splits groups of equal prefixes level by level.

    `group[line]` is the place in the final order where the line's group begins. Whoever is alone in a group, or has run
    out of levels (then the whole group is one and the same prompt), is finished.
    """
    group = np.zeros(len(levels), dtype=np.int32)
    active = np.arange(len(levels), dtype=np.int32)
    level = 0
    while len(active):
        subgroup, first, sizes = _split(group[active], keys[starts[active] + level])
        group[active] = _begins(group[active[first]], active[first], sizes)[subgroup]
        level += 1
        active = active[(sizes[subgroup] > 1) & (levels[active] > level)]
    return np.argsort(group, kind="stable").astype(np.uint32)


def _split(
    parent: npt.NDArray[np.int32], key: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Lines of the same parent and key form a subgroup; these are numbered by (parent, key).

    Returns per line its subgroup, per subgroup its first line and its size.
    """
    combined = (parent.astype(np.uint64) << np.uint64(32)) | key
    by_key = np.argsort(combined, kind="stable").astype(np.int32)
    combined = combined[by_key]
    fresh = np.ones(len(combined), dtype=bool)
    np.not_equal(combined[1:], combined[:-1], out=fresh[1:])
    del combined
    number = np.cumsum(fresh, dtype=np.int32) - np.int32(1)
    subgroup = np.empty(len(number), dtype=np.int32)
    subgroup[by_key] = number
    return subgroup, by_key[fresh], np.bincount(number).astype(np.int32)


def _begins(
    parent: npt.NDArray[np.int32], first_seen: npt.NDArray[np.int32], sizes: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Where each subgroup begins: siblings share out their parent's range in order of first appearance."""
    in_order = np.lexsort((first_seen, parent)).astype(np.int32)
    ordered = parent[in_order]
    before = np.cumsum(sizes[in_order], dtype=np.int32) - sizes[in_order]
    eldest = np.flatnonzero(np.diff(ordered, prepend=np.int32(-1)))
    base = np.repeat(before[eldest], np.diff(eldest, append=len(ordered)))
    begins = np.empty(len(sizes), dtype=np.int32)
    begins[in_order] = ordered + before - base
    return begins
