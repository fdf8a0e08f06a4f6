"""Inputs that lie somewhere else: any file system that fsspec knows, below places that the operator allowed."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from spillway.gateway.service.errors import ForbiddenError, InvalidError, Reason, ResourceError
from spillway.gateway.service.store import Upload

PIECE_BYTES = 1 << 20
MAX_URI_CHARS = 2048


@dataclass(frozen=True, slots=True)
class InputSources:
    """Prefixes below which clients may name inputs, such as "s3://bucket/batches/" or "file:///srv/inputs/".

    None by default: whoever may submit could otherwise read what the gateway can.
    """

    prefixes: tuple[str, ...] = ()

    def check(self, uri: str) -> None:
        """Raises InvalidError for what is no URI, ForbiddenError for one that is not below an allowed prefix."""
        parts = urlsplit(uri) if len(uri) <= MAX_URI_CHARS else None
        if parts is None or not parts.scheme or any(ord(char) < 32 for char in uri):
            raise InvalidError("input_uri is no URI such as s3://bucket/path")
        allowed = any(_is_below(uri, prefix) for prefix in self.prefixes)
        # "::" chains file systems in fsspec, and dots climb: neither can be held against a prefix.
        if not allowed or "::" in uri or ".." in parts.path.split("/"):
            raise ForbiddenError(
                "this gateway fetches no inputs from there", f"Allowed: {', '.join(self.prefixes) or 'none'}."
            )

    def fetch(self, uri: str, upload: Upload, stopped: threading.Event) -> None:
        """Copies the content into the upload; for a thread. Raises as `check`, NotFound as InvalidError, ResourceError.

        Ends early, without an error, once `stopped` is set.
        """
        self.check(uri)
        try:
            with fsspec.open(uri, "rb") as source:
                while not stopped.is_set() and (piece := source.read(PIECE_BYTES)):
                    upload.write(piece)
        except FileNotFoundError:
            raise InvalidError("there is no file at input_uri", reason=Reason.INPUT_NOT_FOUND) from None
        except (OSError, ValueError, ImportError) as error:  # ImportError: a file system that is not installed
            message = f"the input cannot be fetched: {type(error).__name__}: {error}"[:500]
            raise ResourceError(Reason.INPUT_UNREADABLE, message) from error


def _is_below(uri: str, prefix: str) -> bool:
    """Local paths are compared as the file system resolves them, so that no link leads out."""
    if urlsplit(prefix).scheme == "file":
        parts = urlsplit(uri)
        root = Path(urlsplit(prefix).path).resolve()
        return parts.scheme == "file" and parts.netloc == "" and Path(parts.path).resolve().is_relative_to(root)
    return uri.startswith(prefix if prefix.endswith("/") else f"{prefix}/")
