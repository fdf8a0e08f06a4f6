"""Who calls: bearer tokens, kept hashed in a file, each of one tenant and for one kind of caller.

The file has a line per token: `SHA256 TENANT KIND`, with the SHA-256 of the token in hex, and `client` (submits jobs,
sees its tenant's) or `agent` (leases lines of all tenants) as kind. `#` begins a comment. Tokens are random and long,
so a plain hash is enough; whoever reads the file cannot use it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from spillway.api.errors import SpillwayError
from spillway.gateway.service.errors import ForbiddenError, UnauthenticatedError

DEFAULT_TENANT = "default"
_LINE = re.compile(r"([0-9a-f]{64})\s+([A-Za-z0-9][A-Za-z0-9._-]{0,62})\s+(client|agent)")


class Kind(StrEnum):
    """What a caller may do: a client works with jobs of its tenant, an agent with lines of all."""

    CLIENT = "client"
    AGENT = "agent"


class TokenFileError(SpillwayError):
    """The token file cannot be read or understood."""


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller. `kind` is None where no tokens are asked for: then everything is allowed."""

    tenant: str = DEFAULT_TENANT
    kind: Kind | None = None

    def need(self, kind: Kind) -> None:
        """Raises ForbiddenError if the caller is of another kind."""
        if self.kind not in (None, kind):
            raise ForbiddenError(f"this takes the token of a {kind}; yours is of a {self.kind}")


@dataclass(frozen=True, slots=True)
class Access:
    """Knows tokens. Without any (`tokens` is None) everybody is the default tenant: for loopback."""

    tokens: Mapping[str, Caller] | None = field(default=None, repr=False)

    @classmethod
    def load(cls, path: Path) -> Access:
        """Reads a token file. Raises TokenFileError, which never shows the line at fault."""
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
                    f"line {number} of {path} is no token", "Each line is: SHA256-of-token TENANT client|agent."
                )
        return cls(tokens)

    def caller(self, authorization: str | None) -> Caller:
        """Who sent this `authorization` header. Raises UnauthenticatedError."""
        if self.tokens is None:
            return Caller()
        scheme, _, token = (authorization or "").partition(" ")
        # A dictionary of hashes leaks no token through its timing: nobody can steer the hash of a guess.
        found = self.tokens.get(hashlib.sha256(token.strip().encode()).hexdigest())
        if scheme.lower() != "bearer" or found is None:
            raise UnauthenticatedError(
                "a valid bearer token is needed", "Send the header: authorization: Bearer TOKEN."
            )
        return found
