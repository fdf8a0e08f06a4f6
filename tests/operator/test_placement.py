"""Where agents go, and what is said when there is no room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spillway.operator.placement import Needs, Node, Refusal, Taint, Toleration, place

GI = 1 << 30


def node(name: str, gpus: int = 0, memory_gi: int = 8, cpu_millis: int = 4000, **more: object) -> Node:
    return Node(name, gpus, memory_gi * GI, cpu_millis, **more)


def needs(gpus: int = 0, memory_gi: int = 1, cpu_millis: int = 100, **more: object) -> Needs:
    return Needs(gpus, memory_gi * GI, cpu_millis, **more)


NODES = st.lists(
    st.builds(
        node,
        st.uuids().map(str),
        st.integers(-2, 8),
        st.integers(-4, 64),
        st.integers(-100, 8000),
        ready=st.booleans(),
        taints=st.sampled_from([(), (Taint("gpu", "yes", "NoSchedule"),), (Taint("x", "", "PreferNoSchedule"),)]),
    ),
    max_size=6,
    unique_by=lambda each: each.name,
)
NEEDS = st.builds(
    needs,
    st.integers(0, 4),
    st.integers(1, 32),
    st.integers(1, 4000),
    tolerations=st.sampled_from([(), (Toleration("gpu"),)]),
)


@given(NEEDS, NODES)
def test_a_chosen_node_has_room_and_a_refusal_means_there_is_none(wanted: Needs, nodes: list[Node]) -> None:
    chosen = place(wanted, nodes, {})
    usable = [each for each in nodes if each.allows(wanted) and each.fits(wanted)]
    if isinstance(chosen, Refusal):
        assert usable == []
        assert chosen.message.startswith("needs ")
    else:
        assert chosen in usable


@given(NEEDS, NODES, st.randoms(use_true_random=False))
def test_the_answer_does_not_hang_on_the_order_of_nodes(wanted: Needs, nodes: list[Node], random: object) -> None:
    shuffled = list(nodes)
    random.shuffle(shuffled)
    assert place(wanted, nodes, {}) == place(wanted, shuffled, {})


@given(NEEDS, NODES)
def test_packing_until_refused_never_overdraws(wanted: Needs, nodes: list[Node]) -> None:
    free = {each.name: each for each in nodes}
    for _ in range(100):
        chosen = place(wanted, free.values(), {})
        if isinstance(chosen, Refusal):
            break
        free[chosen.name] = chosen.less(wanted)
        left = free[chosen.name]
        assert min(left.gpus, left.memory_bytes, left.cpu_millis) >= 0


def test_replicas_part_before_they_pack() -> None:
    nodes = [node("a", gpus=1), node("b", gpus=4)]
    assert place(needs(gpus=1), nodes, {}) == nodes[0]
    assert place(needs(gpus=1), nodes, {"a": 1}) == nodes[1]


def test_refusals_name_what_is_missing() -> None:
    def said(wanted: Needs, *nodes: Node) -> str:
        answer = place(wanted, nodes, {})
        assert isinstance(answer, Refusal)
        return answer.message

    two = needs(gpus=2, memory_gi=40)
    assert said(two) == "needs 2 GPUs and 40 GiB on one node; the cluster has no nodes"
    assert said(two, node("a", ready=False)) == "needs 2 GPUs and 40 GiB on one node; none of 1 nodes is ready"
    assert (
        said(two, node("node-a"), node("node-b", gpus=1))
        == "needs 2 GPUs and 40 GiB on one node; the largest free is 1 GPU (node-b)"
    )
    assert (
        said(two, node("node-a", gpus=2, memory_gi=16))
        == "needs 2 GPUs and 40 GiB on one node; the largest free is 2 GPUs and 16 GiB (node-a)"
    )
    assert said(needs(cpu_millis=500), node("a", cpu_millis=200)).endswith("the most free there is 200m (a)")
    assert "labels" in said(needs(node_selector={"zone": "x"}), node("a"))
    assert "taint" in said(needs(), node("a", taints=(Taint("k", "v", "NoSchedule"),)))


def test_a_node_takes_no_more_pods_than_it_says() -> None:
    full, free = node("a", pods=0), node("b", pods=1)
    assert place(needs(), [full, free], {}) == free
    answer = place(needs(), [full, free.less(needs())], {})
    assert isinstance(answer, Refusal)
    assert answer.message.endswith("every node there has as many pods as it takes")
