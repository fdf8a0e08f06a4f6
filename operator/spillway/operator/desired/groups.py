"""The life of shard groups: which generation should run, which pods must go. Knows nothing of pods' contents.

A generation is written to the status before its pod is made and never used twice, so that a crash in between skips a
number and doubles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

MAX_BACKOFF_S = 300.0
FIRST_BACKOFF_S = 5.0


class Phase(Enum):
    """Where an agent pod stands. LOST: it failed, ended, or is being deleted by somebody else."""

    GATED = "gated"
    STARTING = "starting"
    READY = "ready"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class AgentPod:
    """What matters of a pod. `template`: a number that changes with what pods are made from."""

    name: str
    group: int
    generation: int
    template: int
    phase: Phase
    deleting: bool = False
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """What is remembered of a group between reconciliations. `not_before_s`: Unix seconds of the next start."""

    index: int
    generation: int = 0
    failures: int = 0
    not_before_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """`groups` must be durable before pods of `create` (group, generation) are made; `delete` holds names."""

    groups: tuple[Group, ...]
    create: tuple[tuple[int, int], ...]
    delete: tuple[str, ...]
    wake_s: float | None = None


def backoff_s(failures: int) -> float:
    """How long a group rests after so many starts in a row that did not get it ready."""
    return 0.0 if failures <= 0 else min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16), MAX_BACKOFF_S)


def decide(
    replicas: int, template: int, remembered: Sequence[Group], pods: Sequence[AgentPod], now_s: float
) -> Decision:
    """What should become of the groups. The same observation always gives the same decision.

    A group whose newest pod is lost moves to the next generation. A group whose pod was made from an older spec does so
    when every other group is ready on the newest, or when it is not ready itself: one at a time, and never waiting for
    what is broken.
    """
    known = {group.index: group for group in remembered}
    decided, create, delete, wake = [], [], [], []
    for index in range(replicas):
        own = [pod for pod in pods if pod.group == index]
        group = known.get(index, Group(index))
        group = replace(group, generation=max([group.generation, *(pod.generation for pod in own)]))
        pod = next((each for each in own if each.generation == group.generation), None)
        delete += [each.name for each in own if each is not pod and not each.deleting]
        if pod is None or pod.phase is Phase.LOST:
            group = _after_loss(group, pod, group.index in known, now_s)
            if pod is not None and not pod.deleting:
                delete.append(pod.name)
            if group.not_before_s > now_s:
                wake.append(group.not_before_s)
            else:
                group = replace(group, generation=group.generation + 1)
                create.append((index, group.generation))
        elif pod.template != template and _may_renew(pod, pods, replicas, template):
            group = replace(group, generation=group.generation + 1, failures=0, not_before_s=0.0)
            delete.append(pod.name)
            create.append((index, group.generation))
        elif pod.phase is Phase.READY:
            group = replace(group, failures=0, not_before_s=0.0)
        decided.append(group)
    # Groups beyond `replicas` end; they are remembered, so that growing again does not reuse their generations.
    delete += [pod.name for pod in pods if pod.group >= replicas and not pod.deleting]
    for index in sorted({group.index for group in remembered} | {pod.group for pod in pods}):
        if index >= replicas:
            seen = [pod.generation for pod in pods if pod.group == index]
            former = known.get(index, Group(index))
            decided.append(Group(index, generation=max([former.generation, *seen])))
    return Decision(tuple(decided), tuple(create), tuple(delete), min(wake, default=None))


def _after_loss(group: Group, pod: AgentPod | None, is_known: bool, now_s: float) -> Group:
    """Counts a failure once: when a lost pod is seen that is not on its way out already."""
    if pod is None or pod.deleting or not is_known:
        return group
    failures = group.failures + 1
    return replace(group, failures=failures, not_before_s=now_s + backoff_s(failures))


def _may_renew(pod: AgentPod, pods: Sequence[AgentPod], replicas: int, template: int) -> bool:
    if pod.phase is not Phase.READY:
        return True
    outdated = sorted(
        each.group for each in pods if each.group < replicas and each.phase is Phase.READY and each.template != template
    )
    current = {each.group for each in pods if each.phase is Phase.READY and each.template == template}
    return outdated[0] == pod.group and len(current | set(outdated)) == replicas
