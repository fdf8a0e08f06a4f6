"""The options of `spillway kv …`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spillway.api.errors import SpillwayError
from spillway.cli.connect import JsonOption
from spillway.cli.options import (
    BlockTokensOption,
    Dtype,
    DtypeOption,
    KvIndexOption,
    PeerTlsCaOption,
    PeerTlsCertOption,
    PeerTlsKeyOption,
    PeerTlsNameOption,
    PeerTokenFileOption,
)
from spillway.cli.peer_options import PeerSecrets

if TYPE_CHECKING:
    from spillway.cli.kv_chains import JobLines
    from spillway.cli.kv_target import KvTarget

kv = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look into a live KV store and look after it: the index in Redis, living agents, disk directories.\n\n"
    "Exit status of all: 0 done and well; 1 it could not be done, and stderr says why; 3 done, and not all is well.",
)

HashesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[HASH]...", help="Block hashes, or their first 8 hex digits or more.")
]
DiskDirOption = Annotated[Path | None, typer.Option(help="A --disk-dir of agents or runs on this machine.")]
IdentityOption = Annotated[
    str,
    typer.Option(help="Only blocks of this identity (model, dtype, …), as `kv status` shows it, or its start."),
]
NodeOption = Annotated[list[str] | None, typer.Option(help="Only this node. Repeat it for more.")]
ModelOption = Annotated[str | None, typer.Option(help="With --input: the checkpoint that the agents run.")]
InputOption = Annotated[Path | None, typer.Option(help="Blocks of the prompts in this OpenAI Batch file.")]
LineOption = Annotated[int | None, typer.Option(min=1, help="Only of this line of it, counted from 1.")]
NO_SECRETS = PeerSecrets(None, None, None, None, "")


class KvUsageError(SpillwayError):
    """Options that do not go together."""


@kv.command()
def status(
    kv_index: KvIndexOption = None,
    disk_dir: DiskDirOption = None,
    identity: IdentityOption = "",
    node: NodeOption = None,
    json: JsonOption = False,
) -> None:
    """Show who has which blocks.

    From the index: nodes with their leases and generations, blocks and bytes by tier, entries of the dead that await
    their deletion. From living agents' /metrics, where they have a page: the share of blocks asked for that some tier
    had, breakers that are not closed, damage found. From a disk directory: its shares, who has them open, their blocks.
    """
    from spillway.cli import kv_status

    target = _target(kv_index, disk_dir, identity, node, NO_SECRETS)
    raise typer.Exit(kv_status.status(target, as_json=json))


@kv.command()
def where(
    hashes: HashesArgument = None,
    model: ModelOption = None,
    input: InputOption = None,  # noqa: A002 - the option's name
    line: LineOption = None,
    dtype: DtypeOption = None,
    block_tokens: BlockTokensOption = 16,
    kv_index: KvIndexOption = None,
    disk_dir: DiskDirOption = None,
    identity: IdentityOption = "",
    json: JsonOption = False,
) -> None:
    """Show where blocks are: by hash, or those of a job's prompts.

    With --model and --input the prompts are tokenized and their blocks named as agents with the same --dtype and
    --block-tokens name them. Status 3 if a block is nowhere.
    """
    from spillway.cli import kv_where

    target = _target(kv_index, disk_dir, identity, None, NO_SECRETS)
    job = _job(model, input, line, dtype, block_tokens)
    if (job is None) == (not hashes):
        raise KvUsageError("which blocks?", "Give hashes, or --model and --input.")
    if job is not None:
        raise typer.Exit(kv_where.where_lines(target, job, as_json=json))
    raise typer.Exit(kv_where.where(target, hashes or [], as_json=json))


@kv.command()
def verify(
    hashes: HashesArgument = None,
    kv_index: KvIndexOption = None,
    disk_dir: DiskDirOption = None,
    identity: IdentityOption = "",
    node: NodeOption = None,
    peer_token_file: PeerTokenFileOption = None,
    peer_tls_cert: PeerTlsCertOption = None,
    peer_tls_key: PeerTlsKeyOption = None,
    peer_tls_ca: PeerTlsCaOption = None,
    peer_tls_name: PeerTlsNameOption = "",
    json: JsonOption = False,
) -> None:
    """Read blocks and check their names, lengths and checksums.

    Of a disk directory, whether or not an agent is using it: every block on it, without changing anything. Of living
    nodes: all that the index says they have, loaded over the network as a peer would. An agent withdraws what it finds
    damaged whenever it reads it, for this command too. Status 3 if anything is damaged or cannot be read.
    """
    from spillway.cli.kv_verify import Verification

    secrets = PeerSecrets(peer_token_file, peer_tls_cert, peer_tls_key, peer_tls_ca, peer_tls_name)
    target = _target(kv_index, disk_dir, identity, node, secrets)
    raise typer.Exit(Verification(target, tuple(hashes or ()), scrub=False, as_json=json).run())


@kv.command()
def scrub(
    hashes: HashesArgument = None,
    kv_index: KvIndexOption = None,
    disk_dir: DiskDirOption = None,
    identity: IdentityOption = "",
    node: NodeOption = None,
    peer_token_file: PeerTokenFileOption = None,
    peer_tls_cert: PeerTlsCertOption = None,
    peer_tls_key: PeerTlsKeyOption = None,
    peer_tls_ca: PeerTlsCaOption = None,
    peer_tls_name: PeerTlsNameOption = "",
    json: JsonOption = False,
) -> None:
    """Verify blocks where they are, and withdraw the damaged ones.

    Living nodes check every copy they have themselves, in memory and on disk; no block travels. In a disk directory,
    shares that no agent uses are mended; of those in use the damage is shown, and withdrawn by a scrub of their nodes.
    """
    from spillway.cli.kv_verify import Verification

    secrets = PeerSecrets(peer_token_file, peer_tls_cert, peer_tls_key, peer_tls_ca, peer_tls_name)
    target = _target(kv_index, disk_dir, identity, node, secrets)
    raise typer.Exit(Verification(target, tuple(hashes or ()), scrub=True, as_json=json).run())


@kv.command()
def drop(
    hashes: HashesArgument = None,
    kv_index: KvIndexOption = None,
    disk_dir: DiskDirOption = None,
    identity: IdentityOption = "",
    node: NodeOption = None,
    peer_token_file: PeerTokenFileOption = None,
    peer_tls_cert: PeerTlsCertOption = None,
    peer_tls_key: PeerTlsKeyOption = None,
    peer_tls_ca: PeerTlsCaOption = None,
    peer_tls_name: PeerTlsNameOption = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Drop blocks by hash, all of a node, all of an identity, or what is in a disk directory.

    Shows first what that means, and asks. No job loses anything but time: what is needed again is computed again. Of a
    living node the blocks go, in memory and on disk, not those on its device; of a dead one its entries in the index,
    which look-ups do not see anyway. An identity whose nodes are all dead goes from the index altogether. In a disk
    directory, shares that no agent uses are emptied.
    """
    from spillway.cli import kv_drop

    secrets = PeerSecrets(peer_token_file, peer_tls_cert, peer_tls_key, peer_tls_ca, peer_tls_name)
    target = _target(kv_index, disk_dir, identity, node, secrets)
    raise typer.Exit(kv_drop.drop(target, hashes or [], sure=yes, as_json=json))


@kv.command()
def warm(
    hashes: HashesArgument = None,
    model: ModelOption = None,
    input: InputOption = None,  # noqa: A002 - the option's name
    line: LineOption = None,
    dtype: DtypeOption = None,
    block_tokens: BlockTokensOption = 16,
    kv_index: KvIndexOption = None,
    node: NodeOption = None,
    peer_token_file: PeerTokenFileOption = None,
    peer_tls_cert: PeerTlsCertOption = None,
    peer_tls_key: PeerTlsKeyOption = None,
    peer_tls_ca: PeerTlsCaOption = None,
    peer_tls_name: PeerTlsNameOption = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one node may take.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """Have living agents bring blocks to their host memory: from their own disks, or from other agents.

    By hash, or those of a job's prompts. Blocks that some agent has computed are found; nothing is computed. Loads of
    running steps go first, and nothing that is needed sooner makes room. Status 3 if not all are there in the end.
    """
    from spillway.cli import kv_warm

    secrets = PeerSecrets(peer_token_file, peer_tls_cert, peer_tls_key, peer_tls_ca, peer_tls_name)
    target = _target(kv_index, None, "", node, secrets)
    job = _job(model, input, line, dtype, block_tokens)
    raise typer.Exit(kv_warm.warm(target, hashes or [], job, timeout_s=timeout, as_json=json))


def _target(
    url: str | None, disk_dir: Path | None, identity: str, node: list[str] | None, secrets: PeerSecrets
) -> KvTarget:
    from spillway.cli.kv_target import KvTarget

    return KvTarget(url, disk_dir, identity, tuple(node or ()), secrets)


def _job(
    model: str | None, path: Path | None, line: int | None, dtype: Dtype | None, block_tokens: int
) -> JobLines | None:
    if model is None and path is None and line is None:
        return None
    if model is None or path is None:
        raise KvUsageError("blocks of a job take the model and its input", "Give --model and --input.")
    from spillway.cli.kv_chains import JobLines

    return JobLines(model, path, line, dtype.value if dtype else None, block_tokens)
