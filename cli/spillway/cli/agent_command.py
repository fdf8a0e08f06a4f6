"""The options of `spillway agent`."""

from __future__ import annotations

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
    ModelOption,
    SeedOption,
)

if TYPE_CHECKING:
    from spillway.node_agent.sharing import SharingConfig


class AgentUsageError(SpillwayError):
    """Options that do not go together."""


def agent(
    model: ModelOption,
    gateway: Annotated[
        str, typer.Option(metavar="HOST:PORT", envvar="SPILLWAY_GATEWAY", help="Where lines come from.")
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
    kv_index: Annotated[
        str | None,
        typer.Option(
            metavar="URL", envvar="SPILLWAY_KV_INDEX", help="Redis where agents tell which blocks they have: redis://…"
        ),
    ] = None,
    peer_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Let other agents load blocks from this one.")
    ] = "",
    peer_address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where they reach it. Default: what --peer-listen says.")
    ] = "",
    peer_token_file: Annotated[
        Path | None, typer.Option(help="File with the secret that agents share among themselves, 16 bytes or more.")
    ] = None,
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
    sharing = _sharing(kv_index, (peer_listen, peer_address), peer_token_file, name)
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


def _sharing(url: str | None, addresses: tuple[str, str], token_file: Path | None, name: str) -> SharingConfig | None:
    if url is None:
        if any(addresses) or token_file is not None:
            raise AgentUsageError("peers find each other through an index", "Give --kv-index.")
        return None
    if any(addresses) and token_file is None:
        raise AgentUsageError("peers need a secret", "Give --peer-token-file.")
    try:
        token = b"" if token_file is None else token_file.read_bytes().strip()
    except OSError as error:
        raise AgentUsageError(f"{token_file} cannot be read: {error.strerror}") from error
    from spillway.node_agent.agent.agent import agent_name
    from spillway.node_agent.sharing import SharingConfig

    listen, address = addresses
    return SharingConfig(url, name or agent_name(), listen, address or listen, token)
