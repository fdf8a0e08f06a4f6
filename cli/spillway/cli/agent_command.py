"""The options of `spillway agent`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spillway.api.errors import SpillwayError
from spillway.cli.flat import flat
from spillway.cli.options import EngineOptions, KvIndexOption
from spillway.cli.peer_options import PeerSecrets

if TYPE_CHECKING:
    from spillway.node_agent.sharing import SharingConfig


class AgentUsageError(SpillwayError):
    """Options that do not go together."""


@flat
def agent(
    *,
    gateway: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT[,…]",
            envvar="SPILLWAY_GATEWAY",
            help="Where lines come from; several over one directory of jobs, separated by commas.",
        ),
    ],
    engine: EngineOptions,
    served_model: Annotated[
        str | None, typer.Option(help="The model name that jobs ask for. Default: what --model says.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the bearer token, read anew for each call. Default: the variable SPILLWAY_TOKEN."),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS, trusting the system's authorities.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(help="Speak TLS, trusting this authority, PEM.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Our own certificate for mutual TLS, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    tls_server_name: Annotated[
        str | None, typer.Option(help="Name in the gateway's certificate, where it is not the host's.")
    ] = None,
    name: Annotated[
        str, typer.Option(help="Who this agent is, in histories. Default: host, process, and chance.")
    ] = "",
    kv_index: KvIndexOption = None,
    peer_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Let other agents load blocks from this one.")
    ] = "",
    peer_address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where they reach it. Default: what --peer-listen says.")
    ] = "",
    secrets: PeerSecrets,
    peer_fabric: Annotated[
        bool, typer.Option("--peer-fabric", help="Experimental: let blocks travel by NIXL, for RDMA. Not with TLS.")
    ] = False,
    max_lines: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Lines held at once. Default: 32 on CPU, twice --max-batch-size on CUDA."),
    ] = None,
    health_listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where /healthz, /readyz and /metrics are. Default: nowhere."),
    ] = None,
    grace: Annotated[float, typer.Option(min=1, help="Seconds between SIGTERM and the end, at most.")] = 30.0,
) -> None:
    """Run lines of a gateway's jobs through a model on this machine, until SIGTERM.

    Ready (see /readyz) once the model has answered a probe the same way twice and the gateway has been reached. While
    the gateway is away the agent works on and tries again for ever. On SIGTERM it takes no further lines, hands back
    unfinished ones, puts KV away, and ends within --grace seconds: status 0, or 3 if time ran out. Killed, it loses
    nothing either: its leases run out and the lines go to other agents.
    """
    from spillway.api.client.target import Target, Tls

    if not tls and (tls_cert or tls_key or tls_server_name) and not tls_ca:
        raise AgentUsageError("--tls-cert, --tls-key and --tls-server-name need TLS", "Add --tls or --tls-ca.")
    secure = Tls(tls_ca, tls_cert, tls_key) if tls or tls_ca else None
    target = Target(gateway, secure, token_file, tls_server_name)
    sharing = _sharing(kv_index, (peer_listen, peer_address, health_listen or ""), secrets, name)
    if sharing and peer_fabric:
        sharing = replace(sharing, peer_fabric=True)
    from spillway.cli.agent import AgentOptions
    from spillway.cli.agent import agent as serve_lines

    serve_lines(
        AgentOptions(
            engine=engine,
            sharing=sharing,
            target=target,
            served_model=served_model or engine.model,
            name=name,
            max_lines=max_lines,
            health_listen=health_listen,
            grace_s=grace,
        )
    )


def _sharing(url: str | None, addresses: tuple[str, str, str], secrets: PeerSecrets, name: str) -> SharingConfig | None:
    """``addresses``: of the block server, where it listens and where others reach it; of the pages about health."""
    listen, address, health = addresses
    token, tls = secrets.read_token(), secrets.tls()
    if url is None:
        if listen or address or token:
            raise AgentUsageError("peers find each other through an index", "Give --kv-index.")
        return None
    if (listen or address) and not token:
        raise AgentUsageError("peers need a secret", "Give --peer-token-file.")
    from spillway.node_agent.agent.agent import agent_name
    from spillway.node_agent.sharing import SharingConfig

    address = address or listen
    return SharingConfig(url, name or agent_name(), listen, address, token, tls, _reachable(health, address))


def _reachable(listen: str, beside: str) -> str:
    """Where others reach what listens on ``listen``: on all interfaces, that is the host of ``beside``."""
    host, _, port = listen.rpartition(":")
    if host in ("", "0.0.0.0", "[::]"):  # noqa: S104 - told apart, not bound
        host = beside.rpartition(":")[0]
    return f"{host}:{port}" if host and port else ""
