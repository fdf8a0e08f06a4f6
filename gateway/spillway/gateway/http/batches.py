"""`/v1/batches` and `/v1/models`: a batch is a job, a model is what agents serve."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
from aiohttp import web

from spillway.api.errors import InputError, LineError
from spillway.api.lines import CHAT_URL, COMPLETIONS_URL
from spillway.gateway.http.objects import Json, batch_object, list_object, model_object
from spillway.gateway.http.reading import (
    MAX_EXPIRY_S,
    MIN_EXPIRY_S,
    json_body,
    json_response,
    page_query,
    tenant,
    window_s,
)
from spillway.gateway.http.refusals import FieldError
from spillway.gateway.http.shelf import Shelf, page_of
from spillway.gateway.options import LineRules
from spillway.gateway.reader import InputFile
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.errors import InvalidError, NotFoundError, Reason
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.served import ServedJob
from spillway.gateway.service.spec import MAX_NAME_CHARS, BatchOrigin, JobRequest, Wish

DEFAULT_PAGE, MAX_PAGE = 20, 100
FIRST_LINES = 1000
"""So many lines may be bad before the file is taken for something else."""
_ENDPOINTS = (CHAT_URL, COMPLETIONS_URL)


class OutputExpiry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long the files that a batch writes are kept, from when they were made on."""

    anchor: Literal["created_at"]
    seconds: int


class BatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiry | None = None

    def expires_after_s(self) -> int | None:
        """Raises FieldError."""
        if self.output_expires_after is None:
            return None
        seconds = self.output_expires_after.seconds
        if not MIN_EXPIRY_S <= seconds <= MAX_EXPIRY_S:
            message = f"seconds must lie in [{MIN_EXPIRY_S}, {MAX_EXPIRY_S}]"
            raise FieldError("output_expires_after.seconds", message)
        return seconds


class BatchRoutes:
    """Handlers; refusals are raised."""

    def __init__(self, ownership: Ownership, shelf: Shelf) -> None:
        self._ownership, self._shelf = ownership, shelf
        self._since_s = time.time()

    @property
    def _coordinator(self) -> Coordinator:
        return self._ownership.coordinator

    def add(self, router: web.UrlDispatcher) -> None:
        """Puts them where OpenAI's clients look."""
        router.add_post("/v1/batches", self.create)
        router.add_get("/v1/batches", self.list)
        router.add_get("/v1/batches/{batch}", self.retrieve)
        router.add_post("/v1/batches/{batch}/cancel", self.cancel)
        router.add_get("/v1/models", self.models)
        router.add_get("/v1/models/{model:.+}", self.model)

    async def create(self, request: web.Request) -> web.Response:
        """Makes a job of an uploaded file. With an Idempotency-Key header, repeating it finds the same job."""
        asked = await json_body(request, BatchRequest)
        who, key = tenant(request), request.headers.get("Idempotency-Key", "")
        if asked.endpoint not in _ENDPOINTS:
            raise FieldError("endpoint", f"endpoint must be {' or '.join(_ENDPOINTS)}")
        window, expires_after_s = window_s(asked.completion_window), asked.expires_after_s()
        file = self._shelf.get(who, asked.input_file_id)
        if file.content is None:
            raise FieldError("input_file_id", f"{file.id} is not an uploaded file")
        model = await asyncio.to_thread(_first_model, file.path, asked.endpoint)
        self._check_model(model)
        origin = BatchOrigin(file.id, asked.endpoint, asked.completion_window, expires_after_s)
        known = self._coordinator.named(who, key) if key else None
        deadline_s = time.time() + window if known is None else known.spec.request.deadline_s
        wanted = JobRequest(model, file.filename[:MAX_NAME_CHARS], asked.metadata or {}, 0, deadline_s, key, origin)
        link = self._coordinator.link(file.content)
        try:
            job = await self._coordinator.submit(who, wanted, link, request.headers.get("traceparent", ""))
        finally:
            link.close()
        return json_response(self._object(job))

    async def list(self, request: web.Request) -> web.Response:
        """Newest first: batches, and jobs of the same tenant that came over gRPC."""
        query = page_query(request, DEFAULT_PAGE, MAX_PAGE)
        jobs = {f"batch_{job.spec.id}": job for job in self._coordinator.jobs(tenant(request))}
        ids, more = page_of([(job.spec.created_s, name) for name, job in jobs.items()], query)
        return json_response(list_object([self._object(jobs[name]) for name in ids], more=more))

    async def retrieve(self, request: web.Request) -> web.Response:
        """How a batch stands."""
        return json_response(self._object(self._named(request, self._coordinator.get)))

    async def cancel(self, request: web.Request) -> web.Response:
        """Stops a batch; what is done until then is kept. Repeating it is no error."""

        def cancel(job_id: str, who: str | None) -> ServedJob:
            return self._coordinator.wish(who or "", job_id, Wish.CANCEL)

        return json_response(self._object(self._named(request, cancel)))

    async def models(self, _request: web.Request) -> web.Response:
        """What agents serve, or have served since the gateway started."""
        rows = [model_object(name, self._since_s) for name in self._coordinator.fleet.models]
        return json_response({"object": "list", "data": rows})

    async def model(self, request: web.Request) -> web.Response:
        """One of them."""
        name = request.match_info["model"]
        if name not in self._coordinator.fleet.models:
            raise NotFoundError(Reason.MODEL_NOT_FOUND, f"no agent serves model {name[:100]!r}")
        return json_response(model_object(name, self._since_s))

    def _object(self, job: ServedJob) -> Json:
        return batch_object(job, self._coordinator.waiting_reason(job))

    def _named(self, request: web.Request, call: Callable[[str, str | None], ServedJob]) -> ServedJob:
        name = request.match_info["batch"]
        if not name.startswith("batch_"):
            raise NotFoundError(Reason.JOB_NOT_FOUND, f"there is no batch {name[:100]}")
        return call(name.removeprefix("batch_"), tenant(request))

    def _check_model(self, model: str) -> None:
        """Raises NotFoundError for a model that nobody has heard of, while agents of others are there.

        With no agent there it is too early to tell: a gateway that just started knows none yet.
        """
        served = self._coordinator.fleet.models
        if served and model not in served and all(job.spec.request.model != model for job in self._coordinator.jobs()):
            names = ", ".join(served[:10])
            raise NotFoundError(Reason.MODEL_NOT_FOUND, f"no agent serves model {model[:100]!r}", f"Served: {names}.")


def _first_model(path: Path, endpoint: str) -> str:
    """The model of the first valid line. Raises InvalidError if there is none near the start of the file."""
    first: LineError | None = None
    try:
        source = InputFile(path)
        try:
            rules = LineRules(url=endpoint)
            for number, raw in enumerate(source.lines(rules.max_bytes, hashlib.sha256()), 1):
                checked = rules.check(raw.content, raw.number)
                if not isinstance(checked, LineError):
                    return checked.body.model
                first = first or checked
                if number >= FIRST_LINES:
                    break
        finally:
            source.close()
    except InputError as error:
        raise InvalidError(error.message.replace(str(path), "file"), error.hint) from None
    if first is None:
        raise InvalidError("the file holds no request line", "Give it one JSON object a line.")
    raise InvalidError(
        f"none of the first lines of the file is a valid request for {endpoint}; line {first.line}: {first.message}"
    )
