"""Shard groups start once a generation, restart as one at the next, and never twice at the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spillway.operator.desired.groups import MAX_BACKOFF_S, AgentPod, Decision, Group, Phase, backoff_s, decide


def pod(group: int, generation: int, phase: Phase = Phase.READY, spec: int = 1, **more: object) -> AgentPod:
    return AgentPod(f"m-{group}-{generation}", group, generation, spec, phase, **more)


def test_from_nothing_every_group_starts_at_generation_one() -> None:
    decision = decide(2, 1, (), (), 0.0)
    assert decision == Decision((Group(0, 1), Group(1, 1)), ((0, 1), (1, 1)), ())


def test_what_is_right_is_left_alone() -> None:
    groups = (Group(0, 3), Group(1, 1))
    assert decide(2, 1, groups, (pod(0, 3), pod(1, 1)), 0.0) == Decision(groups, (), ())


def test_a_deleted_pod_is_followed_at_once_by_the_next_generation() -> None:
    decision = decide(1, 1, (Group(0, 4),), (pod(0, 4, Phase.LOST, deleting=True),), 0.0)
    assert decision == Decision((Group(0, 5),), ((0, 5),), ())


def test_a_failed_pod_rests_first_and_longer_each_time() -> None:
    first = decide(1, 1, (Group(0, 1),), (pod(0, 1, Phase.LOST),), 100.0)
    assert (first.create, first.delete, first.wake_s) == ((), ("m-0-1",), 100.0 + backoff_s(1))
    waiting = decide(1, 1, first.groups, (), 101.0)
    assert (waiting.groups, waiting.create) == (first.groups, ())
    assert decide(1, 1, first.groups, (), 100.0 + backoff_s(1)).create == ((0, 2),)


def test_a_changed_spec_renews_one_ready_group_at_a_time() -> None:
    groups = (Group(0, 1), Group(1, 1))
    first = decide(2, 2, groups, (pod(0, 1), pod(1, 1)), 0.0)
    assert (first.create, first.delete) == (((0, 2),), ("m-0-1",))
    during = decide(2, 2, first.groups, (pod(0, 2, Phase.STARTING, spec=2), pod(1, 1)), 0.0)
    assert (during.create, during.delete) == ((), ())
    after = decide(2, 2, first.groups, (pod(0, 2, spec=2), pod(1, 1)), 0.0)
    assert (after.create, after.delete) == (((1, 2),), ("m-1-1",))


def test_a_group_that_was_not_ready_does_not_wait_for_its_turn() -> None:
    pods = (pod(0, 1), pod(1, 1, Phase.GATED))
    assert decide(2, 2, (Group(0, 1), Group(1, 1)), pods, 0.0).create == ((1, 2),)


def test_shrinking_remembers_generations() -> None:
    shrunk = decide(0, 1, (Group(0, 7),), (pod(0, 7),), 0.0)
    assert (shrunk.delete, shrunk.groups) == (("m-0-7",), (Group(0, 7),))
    assert decide(1, 1, shrunk.groups, (), 0.0).create == ((0, 8),)


@given(st.integers(0, 1000))
def test_backoff_grows_to_a_bound(failures: int) -> None:
    assert 0 <= backoff_s(failures) <= backoff_s(failures + 1) <= MAX_BACKOFF_S


@dataclass
class World:
    """What the API server would hold."""

    replicas: int = 2
    spec: int = 1
    now_s: float = 0.0
    groups: tuple[Group, ...] = ()
    pods: dict[str, AgentPod] = field(default_factory=dict)
    made: set[tuple[int, int]] = field(default_factory=set)


class Life(RuleBasedStateMachine):
    """Pods fail, are deleted and get ready; the operator crashes between any two writes."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(crash_after=st.integers(0, 6))
    def reconcile(self, crash_after: int) -> None:
        world = self.world
        decision = decide(world.replicas, world.spec, world.groups, tuple(world.pods.values()), world.now_s)
        if crash_after == 0:
            return
        world.groups = decision.groups
        writes = [("delete", name) for name in decision.delete] + [("create", each) for each in decision.create]
        for kind, what in writes[: crash_after - 1]:
            if kind == "delete":
                world.pods.pop(what)
            else:
                group, generation = what
                assert (group, generation) not in world.made, "a generation was used twice"
                world.made.add((group, generation))
                made = pod(group, generation, Phase.GATED, world.spec)
                world.pods[made.name] = made

    @precondition(lambda self: self.world.pods)
    @rule(data=st.data(), phase=st.sampled_from(Phase), deleting=st.booleans())
    def change(self, data: st.DataObject, phase: Phase, deleting: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.pods)))
        deleting = deleting or self.world.pods[name].deleting
        phase = Phase.LOST if deleting or self.world.pods[name].phase is Phase.LOST else phase
        self.world.pods[name] = replace(self.world.pods[name], phase=phase, deleting=deleting)

    @precondition(lambda self: self.world.pods)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        self.world.pods.pop(data.draw(st.sampled_from(sorted(self.world.pods))))

    @rule(replicas=st.integers(0, 3))
    def scale(self, replicas: int) -> None:
        self.world.replicas = replicas

    @rule()
    def edit(self) -> None:
        self.world.spec += 1

    @rule(seconds=st.floats(0, 400))
    def wait(self, seconds: float) -> None:
        self.world.now_s += seconds

    @invariant()
    def settles(self) -> None:
        """Left alone, with every pod getting ready, it comes to rest with one current ready pod a group."""
        world = self.world
        groups, pods, now_s = world.groups, dict(world.pods), world.now_s
        for _ in range(40):
            decision = decide(world.replicas, world.spec, groups, tuple(pods.values()), now_s)
            before, groups_before = pods, groups
            groups = decision.groups
            gone = {name for name, each in pods.items() if each.deleting} | set(decision.delete)
            pods = {name: each for name, each in pods.items() if name not in gone}
            for group, generation in decision.create:
                pods[f"m-{group}-{generation}"] = pod(group, generation, Phase.READY, world.spec)
            pods = {
                name: each if each.phase is Phase.LOST else replace(each, phase=Phase.READY)
                for name, each in pods.items()
            }
            now_s = max(now_s, decision.wake_s or 0.0)
            if (pods, groups) == (before, groups_before) and decision.wake_s is None:
                break
        else:
            raise AssertionError("it never comes to rest")
        assert sorted(each.group for each in pods.values()) == list(range(world.replicas))
        assert all(each.template == world.spec for each in pods.values())


def test_who_gets_ready_makes_room_for_the_next_renewal() -> None:
    groups = (Group(0, 1), Group(1, 2))
    assert decide(2, 2, groups, (pod(0, 1), pod(1, 2, Phase.GATED, spec=2)), 0.0).create == ()
    assert decide(2, 2, groups, (pod(0, 1), pod(1, 2, spec=2)), 0.0).create == ((0, 2),)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
