"""What turned is told once, as an event that `kubectl describe` shows."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from kube import Kube, ours

from spillway.operator.cluster import Cluster
from spillway.operator.desired.events import news

NOW_S = 1_800_000_000.0


def condition(kind: str, status: str, reason: str, message: str = "") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def seen(*conditions: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": "m", "namespace": "n", "uid": "u"}
    return ours("ModelDeployment", "m") | {"metadata": metadata, "status": {"conditions": list(conditions)}}


def told(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(each["type"], each["reason"], each["message"]) for each in news(seen(*before), now, NOW_S)]


def test_what_needs_help_is_a_warning_and_what_is_on_its_way_is_none() -> None:
    room = condition("Placed", "False", "NoRoom", "an agent needs 8 GPUs")
    start = condition("Ready", "False", "NotReady", "0 of 1 groups are ready")
    assert told([], [room, start]) == [
        ("Warning", "NoRoom", "Placed: an agent needs 8 GPUs"),
        ("Normal", "NotReady", "Ready: 0 of 1 groups are ready"),
    ]


def test_what_holds_from_the_start_is_no_news_but_what_comes_to_hold_is() -> None:
    holds = condition("GatewayReady", "True", "Answers", "the gateway answers")
    assert told([], [holds]) == []
    away = condition("GatewayReady", "False", "NoAnswer", "the gateway does not answer")
    assert told([holds], [away]) == [("Warning", "NoAnswer", "GatewayReady: the gateway does not answer")]
    assert told([away], [holds]) == [("Normal", "Answers", "GatewayReady: the gateway answers")]


_CONDITIONS = st.lists(
    st.builds(
        condition,
        st.sampled_from(("Ready", "Placed", "Complete")),
        st.sampled_from(("True", "False")),
        st.sampled_from(("NoRoom", "Running")),
        st.sampled_from(("", "0 of 2", "1 of 2")),
    ),
    unique_by=lambda each: each["type"],
)


@given(_CONDITIONS, st.sampled_from(("", "2 of 2")))
def test_a_message_that_counts_on_is_no_news(conditions: list[dict[str, Any]], message: str) -> None:
    assert told(conditions, [each | {"message": message} for each in conditions]) == []


def test_a_real_server_takes_them_and_describe_shows_them(kube: Kube, space: str) -> None:
    made = kube.apply(ours("ModelDeployment", "m", model="/models/m"), space)
    now = [condition("Placed", "False", "NoRoom", "an agent needs 8 GPUs")]

    async def tell() -> None:
        async with Cluster() as cluster:
            for event in news(made, now, NOW_S):
                await cluster.create(event)

    asyncio.run(tell())
    described = kube.plane.kubectl("describe", "modeldeployment", "m", f"--namespace={space}")
    (row,) = [line for line in described.splitlines() if "NoRoom" in line]
    assert row.split()[0] == "Warning"
    assert "spillway-operator" in row
    assert row.endswith("Placed: an agent needs 8 GPUs")
