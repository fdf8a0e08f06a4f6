"""Files, batches and models as OpenAI's API writes them."""

from __future__ import annotations

from typing import Any

from spillway.gateway.http.shelf import Part, ShelfFile, part_id
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.spec import Wish
from spillway.gateway.service.state import State

Json = dict[str, Any]

_STATUSES = {
    State.VALIDATING: "validating",
    State.RUNNING: "in_progress",
    State.PAUSED: "in_progress",
    State.FINALIZING: "finalizing",
    State.COMPLETED: "completed",
    State.CANCELLED: "cancelled",
    State.EXPIRED: "expired",
    State.FAILED: "failed",
}


def file_object(file: ShelfFile) -> Json:
    """A `file`. `status` is deprecated there, and still looked at by some."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_s),
        "expires_at": _second(file.expires_s),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_id(job: ServedJob) -> str:
    """The name of a job here."""
    return f"batch_{job.spec.id}"


def batch_object(job: ServedJob, waiting_reason: str) -> Json:
    """A `batch`. Beyond OpenAI's fields: `waiting_reason`, one sentence on why nothing runs, or empty.

    Jobs that came over gRPC have no endpoint (their lines name theirs), and their own input as input file.
    """
    spec, request, counts, tokens = job.spec, job.spec.request, job.counts(), job.tokens()
    origin, outcome = request.batch, job.spec.outcome
    ended = {} if outcome is None else {f"{_STATUSES[job.state]}_at": int(outcome.end_s)}
    status = _STATUSES[job.state]
    if spec.wish is Wish.CANCEL and outcome is None:
        status = "cancelling"
    paths = job.folder.paths
    return {
        "id": batch_id(job),
        "object": "batch",
        "endpoint": "" if origin is None else origin.endpoint,
        "model": request.model,
        "errors": _errors(job),
        "input_file_id": part_id(job, Part.INPUT) if origin is None else origin.input_file,
        "completion_window": "" if origin is None else origin.window,
        "status": status,
        "output_file_id": part_id(job, Part.OUTPUT) if outcome is not None and paths.output.exists() else None,
        "error_file_id": part_id(job, Part.ERRORS) if outcome is not None and paths.errors.exists() else None,
        "created_at": int(spec.created_s),
        "in_progress_at": job.begun_s,
        "expires_at": _second(request.deadline_s),
        "finalizing_at": _second(job.finalizing_s),
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": _second(spec.wish_s) if spec.wish is Wish.CANCEL else None,
        "cancelled_at": None,
        **ended,
        "request_counts": {"total": counts.total, "completed": counts.completed, "failed": counts.failed},
        "usage": {
            "input_tokens": tokens.prompt_tokens,
            "output_tokens": tokens.completion_tokens,
            "total_tokens": tokens.prompt_tokens + tokens.completion_tokens,
        },
        "metadata": request.labels or None,
        "waiting_reason": waiting_reason,
    }


def model_object(name: str, since_s: float) -> Json:
    """A `model`; `created` is when this gateway began to serve, for nobody says when the model was made."""
    return {"id": name, "object": "model", "created": int(since_s), "owned_by": "spillway"}


def list_object(rows: list[Json], *, more: bool = False) -> Json:
    """A page of a list, with the cursors that clients go on with."""
    ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {"first_id": None, "last_id": None}
    return {"object": "list", "data": rows, **ends, "has_more": more}


def _second(time_s: float | None) -> int | None:
    return None if time_s is None else int(time_s)


def _errors(job: ServedJob) -> Json | None:
    """Why the batch as a whole failed. What is wrong with single lines stands in the error file."""
    outcome = job.spec.outcome
    if outcome is None or not outcome.message:
        return None
    row = {"code": "invalid_input", "message": outcome.message, "param": None, "line": None}
    return {"object": "list", "data": [row]}
