"""`/v1/files`: uploads straight to disk, and downloads straight from it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, MultipartReader, web

from spillway.gateway.http.objects import file_object, list_object
from spillway.gateway.http.reading import (
    BROKEN,
    MAX_EXPIRY_S,
    MIN_EXPIRY_S,
    STALL_S,
    json_response,
    page_query,
    stalled,
    tenant,
)
from spillway.gateway.http.refusals import FieldError
from spillway.gateway.http.shelf import Purpose, Shelf, ShelfFile
from spillway.gateway.http.store import FileSpec, FileStore
from spillway.gateway.service.coordinator import Coordinator
from spillway.gateway.service.errors import InvalidError, Reason, ResourceError
from spillway.gateway.service.limits import Usage
from spillway.gateway.service.ownership import Ownership
from spillway.gateway.service.store import Upload
from spillway.gateway.service.threads import to_the_end

PIECE_BYTES = 256 << 10
FRAME_BYTES = 64 << 10
"""What a form may have around its file."""
MAX_FIELDS = 16
MAX_FIELD_BYTES = 1024
MAX_FILENAME_CHARS = 255
DEFAULT_PAGE, MAX_PAGE = 10_000, 10_000
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(slots=True)
class _Form:
    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)


class FileRoutes:
    """Handlers; refusals are raised."""

    def __init__(self, ownership: Ownership, store: FileStore, shelf: Shelf) -> None:
        self._ownership, self._store, self._shelf = ownership, store, shelf

    @property
    def _coordinator(self) -> Coordinator:
        return self._ownership.coordinator

    def add(self, router: web.UrlDispatcher) -> None:
        """Puts them where OpenAI's clients look."""
        router.add_post("/v1/files", self.upload)
        router.add_get("/v1/files", self.list)
        router.add_get("/v1/files/{file}", self.retrieve)
        router.add_delete("/v1/files/{file}", self.delete)
        router.add_get("/v1/files/{file}/content", self.content)

    async def upload(self, request: web.Request) -> web.Response:
        """A form with `purpose` and `file`, in any order; memory stays at a piece of it."""
        limit = self._coordinator.config.max_input_bytes
        if request.content_length is not None and request.content_length > limit + FRAME_BYTES:
            raise ResourceError(Reason.INPUT_TOO_LARGE, f"the file is larger than {limit} bytes")
        upload, who = self._coordinator.upload(), tenant(request)
        try:
            stated = Usage(input_bytes=max(0, (request.content_length or 0) - FRAME_BYTES))
            await self._coordinator.check_room(who, upload, stated, counts_lines=False)
            form = await _receive(request, upload)
            spec = _spec(form, upload)
            await self._check_quota(who, spec)
            await asyncio.to_thread(upload.finish)
            await self._coordinator.share(upload)
            await to_the_end(self._store.adopt, who, upload, spec)
        finally:
            upload.close()
        return json_response(file_object(self._shelf.get(who, f"file-{upload.id}")))

    async def list(self, request: web.Request) -> web.Response:
        """Newest first, unless `order` says otherwise."""
        query = page_query(request, DEFAULT_PAGE, MAX_PAGE)
        purpose = request.query.get("purpose", "")
        files, more = await self._shelf.page(tenant(request), purpose, query)
        return json_response(list_object([file_object(file) for file in files], more=more))

    async def retrieve(self, request: web.Request) -> web.Response:
        """What a file is."""
        return json_response(file_object(self._file(request)))

    async def delete(self, request: web.Request) -> web.Response:
        """Removes a file."""
        name = request.match_info["file"]
        await self._shelf.delete(tenant(request), name)
        return json_response({"id": name, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.StreamResponse:
        """The bytes, or with a Range header some of them, so that a broken download goes on where it was."""
        file = self._file(request)
        try:
            wanted = request.http_range
        except ValueError:
            raise _unsatisfiable(file) from None
        if wanted.start is not None and wanted.start >= file.size_bytes:
            raise _unsatisfiable(file)
        return web.FileResponse(
            file.path,
            PIECE_BYTES,
            headers={
                "Content-Type": "application/jsonl",
                "Content-Disposition": f'attachment; filename="{_UNSAFE.sub("_", file.filename)}"',
                "Cache-Control": "no-store",
            },
        )

    async def _check_quota(self, who: str, spec: FileSpec) -> None:
        """Files count as inputs do. Raises ResourceError."""
        held = await self._coordinator.holdings(who)
        new = Usage(input_bytes=held.more(spec.sha256, spec.size_bytes))
        self._coordinator.config.limits.of(who).check(held.usage(), new)

    def _file(self, request: web.Request) -> ShelfFile:
        return self._shelf.get(tenant(request), request.match_info["file"])


async def _receive(request: web.Request, upload: Upload) -> _Form:
    """Reads the form, and its file into the upload. Raises InvalidError, FieldError, ResourceError."""
    form = _Form()
    try:
        reader = await request.multipart()
        for _ in range(MAX_FIELDS + 1):
            async with asyncio.timeout(STALL_S):
                part = await reader.next()
            if part is None:
                return form
            await _take(part, form, upload)
    except TimeoutError:
        raise stalled() from None
    except (ValueError, AssertionError, LookupError, EOFError, *BROKEN) as error:
        # The framework's reader meets what is no form with whatever its parts raise.
        raise InvalidError("the body is not a well-formed multipart form") from error
    raise InvalidError(f"the form has more than {MAX_FIELDS} fields")


async def _take(part: MultipartReader | BodyPartReader, form: _Form, upload: Upload) -> None:
    if isinstance(part, MultipartReader):
        raise InvalidError("the form has a form inside")
    if part.headers.get("Content-Transfer-Encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise InvalidError("fields of the form must not be encoded")
    if part.name == "file":
        if form.filename is not None:
            raise FieldError("file", "one file a call")
        form.filename = part.filename or "input.jsonl"
        async for piece in _pieces(part):
            upload.write(piece)
        return
    value = b""
    async for piece in _pieces(part):
        value += piece
        if len(value) > MAX_FIELD_BYTES:
            raise FieldError((part.name or "")[:100], f"longer than {MAX_FIELD_BYTES} bytes")
    form.fields[(part.name or "")[:100]] = value.decode()  # UnicodeDecodeError is a ValueError


async def _pieces(part: BodyPartReader) -> AsyncIterator[bytes]:
    while not part.at_eof():
        async with asyncio.timeout(STALL_S):
            piece = await part.read_chunk(PIECE_BYTES)
        yield piece


def _spec(form: _Form, upload: Upload) -> FileSpec:
    if form.filename is None:
        raise FieldError("file", "the form has no file")
    if form.fields.get("purpose") != Purpose.BATCH:
        raise FieldError("purpose", "purpose must be batch: there is nothing else to do with a file here")
    if not upload.size_bytes:
        raise FieldError("file", "the file is empty")
    if len(form.filename) > MAX_FILENAME_CHARS:
        raise FieldError("file", f"its name is longer than {MAX_FILENAME_CHARS} characters")
    unknown = form.fields.keys() - {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    if unknown:
        raise FieldError(min(unknown), "unknown field")
    now_s = time.time()
    return FileSpec(
        form.filename, upload.sha256, upload.size_bytes, upload.num_lines, now_s, _expiry(form.fields, now_s)
    )


def _expiry(fields: dict[str, str], now_s: float) -> float | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise FieldError("expires_after[anchor]", "anchor must be created_at")
    if seconds is None or not (seconds.isascii() and seconds.isdigit() and len(seconds) < 10):
        raise FieldError("expires_after[seconds]", "seconds must be a number")
    if not MIN_EXPIRY_S <= int(seconds) <= MAX_EXPIRY_S:
        raise FieldError("expires_after[seconds]", f"seconds must lie in [{MIN_EXPIRY_S}, {MAX_EXPIRY_S}]")
    return now_s + int(seconds)


def _unsatisfiable(file: ShelfFile) -> InvalidError:
    message = f"the file has {file.size_bytes} bytes; one range of them may be asked for"
    return InvalidError(message, reason=Reason.RANGE_NOT_SATISFIABLE)
