"""Who calls: bearer tokens, kept hashed in a file, each of one tenant and for one kind of caller.

The file has a line per token: `SHA256 TENANT KIND`, with the SHA-256 of the token in hex, and `client` (submits jobs,
sees its tenant's), `agent` (leases lines of all tenants) or `monitor` (sees figures of all tenants, no lines) as kind.
`#` begins a comment. Tokens are random and long, so a plain hash is enough; whoever reads the file cannot use it.

The file is read again when it changes, so that tokens come and go without a restart. While it cannot be understood the
former tokens stay in force, and the log says so.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from spillway.api.errors import SpillwayError
from spillway.gateway.service.errors import ForbiddenError, UnauthenticatedError

DEFAULT_TENANT = "default"
_LINE = re.compile(r"([0-9a-f]{64})\s+([A-Za-z0-9][A-Za-z0-9._-]{0,62})\s+(client|agent|monitor)")


log = logging.getLogger(__name__)

RELOAD_S = 1.0
"""A change of the token file is seen after this long at most."""
_Stamp = tuple[int, int, int]


class Kind(StrEnum):
    """What a caller may do: a client works with jobs of its tenant, an agent with lines of all, a monitor looks on."""

    CLIENT = "client"
    AGENT = "agent"
    MONITOR = "monitor"


class TokenFileError(SpillwayError):
    """The token file cannot be read or understood."""


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller. `kind` is None where no tokens are asked for: then everything is allowed."""

    tenant: str = DEFAULT_TENANT
    kind: Kind | None = None

    def need(self, *kinds: Kind) -> None:
        """Raises ForbiddenError if the caller is of another kind."""
        if self.kind not in (None, *kinds):
            raise ForbiddenError(f"this takes the token of a {' or '.join(kinds)}; yours is of a {self.kind}")


@dataclass(slots=True)
class Access:
    """Knows tokens. Without any (`tokens` is None) everybody is the default tenant: for loopback."""

    tokens: Mapping[str, Caller] | None = field(default=None, repr=False)
    source: Path | None = None
    """The file that the tokens came from and that is read again when it changes."""
    _stamp: _Stamp | None = None
    _looked_s: float = 0.0
    _trusted: dict[str, Caller] = field(default_factory=dict, repr=False)

    def trust(self, token: str, kind: Kind) -> None:
        """Also lets this token in, whatever the file says: that of processes of our own."""
        self._trusted[hashlib.sha256(token.encode()).hexdigest()] = Caller(DEFAULT_TENANT, kind)

    @classmethod
    def load(cls, path: Path) -> Access:
        """Reads a token file. Raises TokenFileError, which never shows the line at fault."""
        stamp = _stamp_of(path)
        return cls(_read_tokens(path), path, stamp, time.monotonic())

    def refresh(self) -> None:
        """Reads the file again if it changed. Never raises: what cannot be understood changes nothing."""
        self._looked_s = time.monotonic()
        stamp = None if self.source is None else _stamp_of(self.source)
        if self.source is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.tokens = _read_tokens(self.source)
            log.info("the token file was read again: %d tokens", len(self.tokens))
        except TokenFileError as error:
            log.error("the former tokens stay in force: %s", error.message)  # noqa: TRY400 — the trace says nothing

    def caller(self, authorization: str | None) -> Caller:
        """Who sent this `authorization` header. Raises UnauthenticatedError."""
        if self.tokens is None:
            return Caller()
        if self.source is not None and time.monotonic() - self._looked_s > RELOAD_S:
            self.refresh()
        scheme, _, token = (authorization or "").partition(" ")
        # A dictionary of hashes leaks no token through its timing: nobody can steer the hash of a guess.
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found = self.tokens.get(digest) or self._trusted.get(digest)
        if scheme.lower() != "bearer" or found is None:
            raise UnauthenticatedError(
                "a valid bearer token is needed", "Send the header: authorization: Bearer TOKEN."
            )
        return found


def _stamp_of(path: Path) -> _Stamp | None:
    """What shows that a file was changed or replaced; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_tokens(path: Path) -> dict[str, Caller]:
    """Raises TokenFileError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(f"the token file {path} cannot be read: {error}") from error
    tokens = {}
    for number, line in enumerate(lines, 1):
        stated = line.partition("#")[0].strip()
        match = _LINE.fullmatch(stated)
        if match is not None:
            tokens[match[1]] = Caller(match[2], Kind(match[3]))
        elif stated:
            raise TokenFileError(
                f"line {number} of {path} is no token", "Each line is: SHA256-of-token TENANT client|agent|monitor."
            )
    return tokens
