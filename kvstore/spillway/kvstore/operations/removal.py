"""Takes out of the index what no living node stands for."""

from __future__ import annotations

from ..errors import StillLivingError
from ..index.redis_scripts import CLEAN, END, FORGET, Keys
from .shared_index import BUCKETS_AT_ONCE, Node, SharedIndex


def forget_node(index: SharedIndex, node: Node) -> int:
    """Delete a dead node's entries and its name, in short calls; how many entries.

    Raises `StillLivingError` if it has come back, `IndexUnavailableError`.
    """
    keys, removed = node.keys, 0
    reverse = keys.of("r", node.number)
    with index.answering():
        clean, forget, end = (index.client.register_script(script) for script in (CLEAN, FORGET, END))
        if lease := index.client.hget(keys.of("leases"), node.number):
            end(keys=[keys.of("leases")], args=[node.number, lease])
        while buckets := index.client.srandmember(reverse, BUCKETS_AT_ONCE):
            for bucket in buckets:
                names = [keys.of("leases"), reverse, keys.of("b", int(bucket))]
                count = int(clean(keys=names, args=[node.number, node.generation, int(bucket), 1]))
                if count < 0:
                    raise StillLivingError(f"{node.name} has come back: nothing more is removed")
                removed += count
        parts = ("leases", "numbers", "generations", "writes", "about")
        names = [*(keys.of(part) for part in parts), reverse, keys.of("s", node.number)]
        forget(keys=names, args=[node.number, 0])
    return removed


def remove_namespace(index: SharedIndex, keys: Keys) -> int:
    """Delete all keys of a namespace that no living node uses, in short calls; how many keys there were.

    Raises `StillLivingError`, `IndexUnavailableError`.
    """
    living = [node.name for node in index.nodes(keys) if node.live]
    if living:
        raise StillLivingError(f"living nodes use it: {', '.join(living)}; stop them first")
    removed = 0
    with index.answering():
        numbers = index.client.hkeys(keys.of("leases"))
        for start in range(0, keys.buckets, BUCKETS_AT_ONCE):
            buckets = range(start, min(start + BUCKETS_AT_ONCE, keys.buckets))
            removed += int(index.client.unlink(*(keys.of("b", bucket) for bucket in buckets)))
        names = [keys.of(part, int(number)) for number in numbers for part in ("r", "s")]
        names += [keys.of(part) for part in ("numbers", "generations", "writes", "about", "cleaner", "leases")]
        for start in range(0, len(names), BUCKETS_AT_ONCE):
            removed += int(index.client.unlink(*names[start : start + BUCKETS_AT_ONCE]))
    return removed
