"""Which node takes an agent: arithmetic over what nodes offer and what is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

_GI = 1 << 30


@dataclass(frozen=True, slots=True)
class Needs:
    """What one agent asks for."""

    gpus: int
    memory_bytes: int
    cpu_millis: int
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()


@dataclass(frozen=True, slots=True)
class Toleration:
    """`value` None tolerates every value of the key, `effect` None every effect."""

    key: str
    value: str | None = None
    effect: str | None = None

    def covers(self, taint: Taint) -> bool:
        """Whether this taint is put up with."""
        return self.key == taint.key and self.value in (None, taint.value) and self.effect in (None, taint.effect)


@dataclass(frozen=True, slots=True)
class Taint:
    """As it stands on a node."""

    key: str
    value: str
    effect: str


@dataclass(frozen=True, slots=True)
class Node:
    """A node and what is free on it: allocatable less the requests of pods that are bound or promised to it."""

    name: str
    gpus: int
    memory_bytes: int
    cpu_millis: int
    pods: int = 110
    ready: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()

    def less(self, needs: Needs) -> Node:
        """The node with an agent more on it."""
        return replace(
            self,
            gpus=self.gpus - needs.gpus,
            memory_bytes=self.memory_bytes - needs.memory_bytes,
            cpu_millis=self.cpu_millis - needs.cpu_millis,
            pods=self.pods - 1,
        )

    def fits(self, needs: Needs) -> bool:
        """Whether an agent more has room."""
        return (
            self.pods >= 1
            and self.gpus >= needs.gpus
            and self.memory_bytes >= needs.memory_bytes
            and self.cpu_millis >= needs.cpu_millis
        )

    def allows(self, needs: Needs) -> bool:
        """Whether agents may run here at all, room aside."""
        return (
            self.ready
            and all(self.labels.get(key) == value for key, value in needs.node_selector.items())
            and all(
                taint.effect == "PreferNoSchedule" or any(each.covers(taint) for each in needs.tolerations)
                for taint in self.taints
            )
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """No node takes the agent: one plain sentence on what is missing."""

    message: str


def place(needs: Needs, nodes: Iterable[Node], siblings: Mapping[str, int]) -> Node | Refusal:
    """The node for one agent. `siblings`: groups of the same deployment on each node.

    Apart from siblings first, so that a lost node takes one replica; then where least is left over, so that large
    gaps stay for large groups; then by name, so that the same cluster always gives the same answer.
    """
    nodes = list(nodes)
    allowed = [node for node in nodes if node.allows(needs)]
    fitting = [node for node in allowed if node.fits(needs)]
    if not fitting:
        return Refusal(_missing(needs, nodes, allowed))
    return min(
        fitting,
        key=lambda node: (siblings.get(node.name, 0), node.gpus, node.memory_bytes, node.cpu_millis, node.name),
    )


def _missing(needs: Needs, nodes: list[Node], allowed: list[Node]) -> str:
    wanted = f"needs {_amounts(needs.gpus, needs.memory_bytes)} on one node"
    if not nodes:
        return f"{wanted}; the cluster has no nodes"
    if not allowed:
        ready = sum(node.ready for node in nodes)
        if ready == 0:
            return f"{wanted}; none of {len(nodes)} nodes is ready"
        return f"{wanted}; none of {ready} ready nodes has the labels asked for without a taint against it"
    if all(node.pods < 1 for node in allowed):
        return f"{wanted}; every node there has as many pods as it takes"
    allowed = [node for node in allowed if node.pods >= 1]
    enough_gpus = [node for node in allowed if node.gpus >= needs.gpus]
    if not enough_gpus:
        best = max(allowed, key=lambda node: (node.gpus, node.memory_bytes, node.name))
        return f"{wanted}; the largest free is {_gpus(best.gpus)} ({best.name})"
    enough_memory = [node for node in enough_gpus if node.memory_bytes >= needs.memory_bytes]
    if not enough_memory:
        best = max(enough_gpus, key=lambda node: (node.memory_bytes, node.name))
        return f"{wanted}; the largest free is {_amounts(best.gpus, best.memory_bytes)} ({best.name})"
    best = max(enough_memory, key=lambda node: (node.cpu_millis, node.name))
    return f"{wanted} with {needs.cpu_millis}m of CPU; the most free there is {best.cpu_millis}m ({best.name})"


def _gpus(count: int) -> str:
    return "no GPU" if count <= 0 else f"{count} GPU" if count == 1 else f"{count} GPUs"


def _amounts(gpus: int, memory_bytes: int) -> str:
    memory = f"{max(memory_bytes, 0) / _GI:.3g} GiB"
    return memory if gpus <= 0 else f"{_gpus(gpus)} and {memory}"
