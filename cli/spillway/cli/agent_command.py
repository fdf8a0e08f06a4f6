"""The options of `spillway agent`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spillway.api.errors import SpillwayError
from spillway.cli.options import (
    BatchSizeOption,
    BatchTokensOption,
    BlockTokensOption,
    Device,
    DeviceKvOption,
    DeviceOption,
    DiskKvOption,
    DtypeOption,
    HostKvOption,
    KvIndexOption,
    KvPolicy,
    KvPolicyOption,
    ModelOption,
    PeerTlsCaOption,
    PeerTlsCertOption,
    PeerTlsKeyOption,
    PeerTlsNameOption,
    PeerTokenFileOption,
    SeedOption,
)
from spillway.cli.peer_options import PeerSecrets

if TYPE_CHECKING:
    from spillway.node_agent.sharing import SharingConfig


class AgentUsageError(SpillwayError):
    """Options that do not go together."""


def agent(
    model: ModelOption,
    gateway: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT[,…]",
            envvar="SPILLWAY_GATEWAY",
            help="Where lines come from; several over one directory of jobs, separated by commas.",
        ),
    ],
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
    peer_token_file: PeerTokenFileOption = None,
    peer_tls_cert: PeerTlsCertOption = None,
    peer_tls_key: PeerTlsKeyOption = None,
    peer_tls_ca: PeerTlsCaOption = None,
    peer_tls_name: PeerTlsNameOption = "",
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
    dtype: DtypeOption = None,
    device: DeviceOption = Device.AUTO,
    device_kv: DeviceKvOption = None,
    host_kv: HostKvOption = None,
    disk_kv: DiskKvOption = None,
    disk_dir: Annotated[
        Path | None,
        typer.Option(help="Where KV on disk lives. Given, it is kept and found again by the next agent here."),
    ] = None,
    kv_policy: KvPolicyOption = KvPolicy.PLAN,
    block_tokens: BlockTokensOption = 16,
    max_batch_tokens: BatchTokensOption = None,
    max_batch_size: BatchSizeOption = 256,
    seed: SeedOption = 0,
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
    secrets = PeerSecrets(peer_token_file, peer_tls_cert, peer_tls_key, peer_tls_ca, peer_tls_name)
    sharing = _sharing(kv_index, (peer_listen, peer_address, health_listen or ""), secrets, name)
    if sharing and peer_fabric:
        sharing = replace(sharing, peer_fabric=True)
    from spillway.cli.agent import AgentOptions
    from spillway.cli.agent import agent as serve_lines

    serve_lines(
        AgentOptions(
            model=model,
            dtype=dtype.value if dtype else None,
            device=device.value,
            device_kv_bytes=device_kv,
            host_kv_bytes=host_kv,
            disk_kv_bytes=disk_kv,
            disk_dir=disk_dir,
            kv_policy=kv_policy.value,
            block_tokens=block_tokens,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_batch_size,
            seed=seed,
            sharing=sharing,
            target=target,
            served_model=served_model or model,
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
