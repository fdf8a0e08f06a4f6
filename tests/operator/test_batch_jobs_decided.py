"""From a BatchJob and the gateway's job to one next step, and to sentences that people can act on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spillway.api.resources import BatchJob
from spillway.api.resources.batch_job import FINAL_STATES, LineCountsStatus, State
from spillway.operator.desired.batch_jobs import (
    MAX_POLL_S,
    MIN_POLL_S,
    GatewayJob,
    Step,
    Trouble,
    decide,
    found_status,
    poll_s,
)
from spillway.operator.names import FINALIZER

STATES: tuple[State, ...] = (
    "Validating",
    "Running",
    "Paused",
    "Finalizing",
    "Completed",
    "Cancelled",
    "Expired",
    "Failed",
)


def batch_job(
    *, held: bool = True, deleting: bool = False, paused: bool = False, job: str = "jobs/1", state: State = "Running"
) -> BatchJob:
    metadata: dict[str, Any] = {"name": "b", "namespace": "n", "uid": "u", "generation": 1}
    if held:
        metadata["finalizers"] = [FINALIZER]
    if deleting:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    spec = {"model": "m", "input": {"inline": "{}"}, "paused": paused}
    return BatchJob.read({"metadata": metadata, "spec": spec, "status": {"job": job, "state": state}})


def at(state: State, why: str = "", **lines: Any) -> GatewayJob:
    return GatewayJob(
        "jobs/1", state, LineCountsStatus(**lines), why, 1_800_000_000.0 if state in FINAL_STATES else None
    )


def test_held_before_submitted_and_told_before_let_go() -> None:
    new = batch_job(held=False, job="", state="Pending")
    assert decide(new, None) is Step.HOLD
    assert decide(batch_job(job="", state="Pending"), None) is Step.SUBMIT
    assert decide(batch_job(), at("Running")) is Step.REST
    assert decide(batch_job(), at("Completed")) is Step.REST, "the status first: it alone remembers the end"
    assert decide(batch_job(state="Completed"), None) is Step.RELEASE
    assert decide(batch_job(state="Completed", held=False), None) is Step.REST


def test_pause_follows_the_spec() -> None:
    assert decide(batch_job(paused=True), at("Running")) is Step.PAUSE
    assert decide(batch_job(paused=True), at("Paused")) is Step.REST
    assert decide(batch_job(), at("Paused")) is Step.RESUME
    assert decide(batch_job(paused=True), at("Finalizing")) is Step.REST


def test_deleted_it_is_cancelled_first() -> None:
    assert decide(batch_job(deleting=True), at("Running")) is Step.CANCEL
    assert decide(batch_job(deleting=True), at("Cancelled")) is Step.RELEASE
    assert decide(batch_job(deleting=True, job=""), None) is Step.RELEASE
    assert decide(batch_job(deleting=True, job="", held=False), None) is Step.REST


@given(
    held=st.booleans(),
    deleting=st.booleans(),
    paused=st.booleans(),
    known=st.booleans(),
    told=st.sampled_from(("Pending", *STATES)),
    found=st.sampled_from((None, *STATES)),
)
def test_a_second_job_is_never_made(
    held: bool, deleting: bool, paused: bool, known: bool, told: State, found: State | None
) -> None:
    seen = batch_job(held=held, deleting=deleting, paused=paused, job="jobs/1" if known else "", state=told)
    step = decide(seen, None if found is None else at(found))
    if step is Step.SUBMIT:
        assert held, "what is not held could be deleted without its job"
        assert (known, found, deleting) == (False, None, False)
        assert told not in FINAL_STATES
    if step in (Step.PAUSE, Step.RESUME, Step.CANCEL):
        assert found is not None
        assert found not in FINAL_STATES


def message(job: GatewayJob | None, trouble: Trouble | None = None, **seen: Any) -> str:
    status = found_status(batch_job(**seen), job, trouble, 1_800_000_000.0)
    return next(each.message for each in status.conditions if each.type == "Complete")


def test_sentences() -> None:
    assert message(at("Running", total=40, completed=12, pending=28)) == "12 of 40 lines are done"
    waiting = at("Running", "no agent has asked for lines", total=4, pending=4)
    assert message(waiting) == "0 of 4 lines are done; no agent has asked for lines"
    failed = at("Completed", total=4, completed=2, failed=2, failed_by_code={"b": 1, "a": 1})
    assert message(failed) == "4 of 4 lines are done, 2 of them with an error (1 a, 1 b): spillway results jobs/1"
    assert message(at("Failed", "no line at all")) == "no line at all"
    assert "the gateway no longer has jobs/1" in message(None)


def test_what_could_not_be_seen_stays_and_saying_it_again_changes_nothing() -> None:
    seen = batch_job()
    away = Trouble("GatewayReady", "NoAnswer", "the gateway at g:1 does not answer; it is asked again")
    told = found_status(seen, None, away, 1_800_000_000.0)
    assert (told.state, told.job) == ("Running", "jobs/1")
    again = found_status(seen.model_copy(update={"status": told}), None, away, 1_800_000_500.0)
    assert again == told


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_an_end_is_an_end(state: State) -> None:
    over = batch_job(state=state)
    assert found_status(over, at("Running"), None, 1_800_000_000.0) == over.status


@given(st.floats(min_value=0, max_value=1e9))
def test_polls_are_neither_hot_nor_asleep(age_s: float) -> None:
    assert MIN_POLL_S <= poll_s(age_s) <= MAX_POLL_S
