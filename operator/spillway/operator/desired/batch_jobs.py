"""BatchJob and the gateway's job to the next step, and to the status. Both are functions of what was seen alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from spillway.api.resources import BatchJob, BatchJobStatus
from spillway.api.resources.batch_job import FINAL_STATES, LineCountsStatus, State
from spillway.operator.desired.conditions import Finding, conditions, rfc3339
from spillway.operator.names import FINALIZER

INPUT_MISSING = "InputMissing"
"""Reason of a Trouble: the lines are not there yet."""
MIN_POLL_S, MAX_POLL_S = 1.0, 10.0
_POLLS_PER_AGE = 20.0


@dataclass(frozen=True, slots=True)
class GatewayJob:
    """The gateway's job as it was just now. `why`: one sentence on why nothing of it runs, or why it FAILED."""

    name: str
    state: State
    lines: LineCountsStatus = field(default_factory=LineCountsStatus)
    why: str = ""
    end_s: float | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in FINAL_STATES


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps a look from going on. `is_final`: asking again cannot help, so the BatchJob has failed."""

    type: Literal["GatewayReady", "Submitted"]
    reason: str
    message: str
    is_final: bool = False


class Step(Enum):
    """What to do next. After all but REST one looks again."""

    HOLD = auto()
    """Put our finalizer on the object: from then on there may be a job at the gateway."""
    SUBMIT = auto()
    PAUSE = auto()
    RESUME = auto()
    CANCEL = auto()
    """Of an object that is being deleted: its job, and then take the finalizer off."""
    RELEASE = auto()
    """Take the finalizer off: there is nothing to cancel, and never will be."""
    REST = auto()


def decide(batch_job: BatchJob, job: GatewayJob | None) -> Step:
    """The next step. `job`: what the gateway has of this object, None if it has nothing."""
    is_held = FINALIZER in batch_job.metadata.finalizers
    if batch_job.status.state in FINAL_STATES:
        return Step.RELEASE if is_held else Step.REST
    if batch_job.metadata.deletion_timestamp is not None:
        if not is_held:
            return Step.REST
        return Step.CANCEL if job is not None and not job.is_final else Step.RELEASE
    if job is None:
        if batch_job.status.job:
            return Step.REST  # it was there once: a second one would run its lines again
        return Step.SUBMIT if is_held else Step.HOLD
    if batch_job.spec.paused and job.state in ("Validating", "Running"):
        return Step.PAUSE
    if not batch_job.spec.paused and job.state == "Paused":
        return Step.RESUME
    return Step.REST


def poll_s(age_s: float) -> float:
    """How long to wait until the gateway is asked again: short for a young job, and never long."""
    return min(max(age_s / _POLLS_PER_AGE, MIN_POLL_S), MAX_POLL_S)


def found_status(batch_job: BatchJob, job: GatewayJob | None, trouble: Trouble | None, now_s: float) -> BatchJobStatus:
    """The status; the same as before where nothing changed. What could not be seen stays as it was last seen."""
    former = batch_job.status
    if former.state in FINAL_STATES:
        return former
    generation = batch_job.metadata.generation
    is_lost = job is None and trouble is None and bool(former.job)
    is_failed = is_lost or (trouble is not None and trouble.is_final)
    state: State = "Failed" if is_failed else job.state if job is not None else former.state
    lines = job.lines if job is not None else former.lines
    end_s = now_s if is_failed else job.end_s if job is not None else None
    found = _findings(batch_job, job, trouble)
    return BatchJobStatus(
        observed_generation=generation,
        job=job.name if job is not None else former.job,
        state=state,
        progress=f"{lines.completed + lines.failed}/{lines.total}" if lines.total else "",
        lines=lines,
        completion_time=rfc3339(end_s) if end_s is not None else None,
        conditions=conditions(found, former.conditions, generation, rfc3339(now_s)),
    )


def _findings(batch_job: BatchJob, job: GatewayJob | None, trouble: Trouble | None) -> list[Finding]:
    former = batch_job.status
    name = job.name if job is not None else former.job
    said = {"GatewayReady": Finding("GatewayReady", holds=True, reason="Answers", message="the gateway answers")}
    if name:
        message = f"the gateway has it as {name}"
        said["Submitted"] = Finding("Submitted", holds=True, reason="Accepted", message=message)
    if trouble is not None:
        said[trouble.type] = Finding(trouble.type, holds=False, reason=trouble.reason, message=trouble.message)
        said["Complete"] = Finding("Complete", holds=False, reason=trouble.reason, message=trouble.message)
    elif job is not None:
        said["Complete"] = Finding("Complete", job.state == "Completed", job.state, _sentence(job))
    elif name:
        message = f"the gateway no longer has {name}, so its lines are not run again: make another BatchJob for them"
        said["Complete"] = Finding("Complete", holds=False, reason="JobLost", message=message)
    return list(said.values())


def _sentence(job: GatewayJob) -> str:
    lines = job.lines
    done = lines.completed + lines.failed
    counts = f"{done} of {lines.total} lines are done"
    if lines.failed:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(lines.failed_by_code.items()))
        counts += f", {lines.failed} of them with an error ({codes})"
    said = {
        "Pending": "",
        "Validating": "the gateway checks the lines",
        "Running": f"{counts}; {job.why}" if job.why else counts,
        "Paused": f"paused; {counts}",
        "Finalizing": f"{counts}; results are being written",
        "Completed": f"{counts}: spillway results {job.name}",
        "Cancelled": f"cancelled; {counts}",
        "Expired": f"the deadline passed; {counts}",
        "Failed": job.why,
    }
    return said[job.state]
