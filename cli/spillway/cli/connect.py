"""Which gateway the client commands speak to: options, then variables, then ~/.config/spillway/client.toml."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from spillway.api.errors import SpillwayError

DEFAULT_GATEWAY = "127.0.0.1:7400"
KEYS = {"gateway": str, "token_file": str, "tls": bool, "tls_ca": str, "tls_cert": str, "tls_key": str}

JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="As `spillway submit` printed it: jobs/ID, or ID.")]


class ClientConfigError(SpillwayError):
    """The configuration file cannot be used."""


@dataclass(frozen=True, slots=True)
class Connection:
    """What the options said."""

    gateway: Annotated[
        str | None,
        typer.Option(
            "--gateway",
            metavar="HOST:PORT[,…]",
            envvar="SPILLWAY_GATEWAY",
            help="One gateway, or several over one directory. "
            f"Default: `gateway` in ~/.config/spillway/client.toml, else {DEFAULT_GATEWAY}.",
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            envvar="SPILLWAY_TOKEN_FILE",
            help="File with the bearer token. Default: `token_file` in client.toml, else the variable SPILLWAY_TOKEN.",
        ),
    ] = None


def config_path() -> Path:
    """Where the configuration is, whether or not it exists."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "spillway" / "client.toml"


def target(connection: Connection) -> Any:
    """A spillway.api.client.target.Target. Raises ClientConfigError."""
    from spillway.api.client.target import Target, Tls

    stored = _load(config_path())
    files = {key: Path(stored[key]).expanduser() for key in KEYS if key not in ("gateway", "tls") and key in stored}
    secure = None
    if stored.get("tls") or "tls_ca" in files:
        secure = Tls(files.get("tls_ca"), files.get("tls_cert"), files.get("tls_key"))
    address = connection.gateway or stored.get("gateway") or DEFAULT_GATEWAY
    return Target(address, secure, connection.token_file or files.get("token_file"))


def job_name(text: str) -> str:
    """ "jobs/ID" of either form."""
    return text if text.startswith("jobs/") else f"jobs/{text}"


def _load(path: Path) -> dict[str, Any]:
    try:
        stored = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ClientConfigError(f"{path} cannot be used: {error}") from error
    for key, value in stored.items():
        if key not in KEYS or not isinstance(value, KEYS[key]):
            raise ClientConfigError(
                f"{path}: {key} is not a setting, or not of this kind", f"Known: {', '.join(KEYS)}."
            )
    return stored
