"""The options of `spillway kv …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spillway.api.errors import SpillwayError
from spillway.cli.connect import JsonOption
from spillway.cli.flat import flat
from spillway.cli.options import BlockTokensOption, DtypeOption, KvIndexOption
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
NodeOption = Annotated[list[str] | None, typer.Option(help="Only this node. Repeat it for more.")]
NO_SECRETS = PeerSecrets()


class KvUsageError(SpillwayError):
    """Options that do not go together."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which store, and whose blocks in it."""

    index_url: KvIndexOption = None
    disk_dir: Annotated[
        Path | None, typer.Option("--disk-dir", help="A --disk-dir of agents or runs on this machine.")
    ] = None
    identity: Annotated[
        str,
        typer.Option(
            "--identity",
            help="Only blocks of this identity (model, dtype, …), as `kv status` shows it, or its start.",
        ),
    ] = ""

    def target(self, node: list[str] | None, secrets: PeerSecrets) -> KvTarget:
        """What of it a command is about."""
        from spillway.cli.kv_target import KvTarget

        return KvTarget(self.index_url, self.disk_dir, self.identity, tuple(node or ()), secrets)


@dataclass(frozen=True, slots=True)
class Prompts:
    """A job's prompts, in place of hashes."""

    model: Annotated[str | None, typer.Option("--model", help="With --input: the checkpoint that the agents run.")] = (
        None
    )
    input: Annotated[Path | None, typer.Option("--input", help="Blocks of the prompts in this OpenAI Batch file.")] = (
        None
    )
    line: Annotated[int | None, typer.Option("--line", min=1, help="Only of this line of it, counted from 1.")] = None
    dtype: DtypeOption = None
    block_tokens: BlockTokensOption = 16

    def lines(self) -> JobLines | None:
        """None if nothing was said of a job. Raises KvUsageError."""
        if self.model is None and self.input is None and self.line is None:
            return None
        if self.model is None or self.input is None:
            raise KvUsageError("blocks of a job take the model and its input", "Give --model and --input.")
        from spillway.cli.kv_chains import JobLines

        return JobLines(self.model, self.input, self.line, self.dtype, self.block_tokens)


@kv.command()
@flat
def status(*, place: Place, node: NodeOption = None, json: JsonOption = False) -> None:
    """Show who has which blocks.

    From the index: nodes with their leases and generations, blocks and bytes by tier, entries of the dead that await
    their deletion. From living agents' /metrics, where they have a page: the share of blocks asked for that some tier
    had, breakers that are not closed, damage found. From a disk directory: its shares, who has them open, their blocks.
    """
    from spillway.cli import kv_status

    raise typer.Exit(kv_status.status(place.target(node, NO_SECRETS), as_json=json))


@kv.command()
@flat
def where(*, hashes: HashesArgument = None, prompts: Prompts, place: Place, json: JsonOption = False) -> None:
    """Show where blocks are: by hash, or those of a job's prompts.

    With --model and --input the prompts are tokenized and their blocks named as agents with the same --dtype and
    --block-tokens name them. Status 3 if a block is nowhere.
    """
    from spillway.cli import kv_where

    target, job = place.target(None, NO_SECRETS), prompts.lines()
    if (job is None) == (not hashes):
        raise KvUsageError("which blocks?", "Give hashes, or --model and --input.")
    if job is not None:
        raise typer.Exit(kv_where.where_lines(target, job, as_json=json))
    raise typer.Exit(kv_where.where(target, hashes or [], as_json=json))


@kv.command()
@flat
def verify(
    *,
    hashes: HashesArgument = None,
    place: Place,
    node: NodeOption = None,
    secrets: PeerSecrets,
    json: JsonOption = False,
) -> None:
    """Read blocks and check their names, lengths and checksums.

    Of a disk directory, whether or not an agent is using it: every block on it, without changing anything. Of living
    nodes: all that the index says they have, loaded over the network as a peer would. An agent withdraws what it finds
    damaged whenever it reads it, for this command too. Status 3 if anything is damaged or cannot be read.
    """
    from spillway.cli.kv_verify import Verification

    target = place.target(node, secrets)
    raise typer.Exit(Verification(target, tuple(hashes or ()), scrub=False, as_json=json).run())


@kv.command()
@flat
def scrub(
    *,
    hashes: HashesArgument = None,
    place: Place,
    node: NodeOption = None,
    secrets: PeerSecrets,
    json: JsonOption = False,
) -> None:
    """Verify blocks where they are, and withdraw the damaged ones.

    Living nodes check every copy they have themselves, in memory and on disk; no block travels. In a disk directory,
    shares that no agent uses are mended; of those in use the damage is shown, and withdrawn by a scrub of their nodes.
    """
    from spillway.cli.kv_verify import Verification

    target = place.target(node, secrets)
    raise typer.Exit(Verification(target, tuple(hashes or ()), scrub=True, as_json=json).run())


@kv.command()
@flat
def drop(
    *,
    hashes: HashesArgument = None,
    place: Place,
    node: NodeOption = None,
    secrets: PeerSecrets,
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

    raise typer.Exit(kv_drop.drop(place.target(node, secrets), hashes or [], sure=yes, as_json=json))


@kv.command()
@flat
def warm(
    *,
    hashes: HashesArgument = None,
    prompts: Prompts,
    kv_index: KvIndexOption = None,
    node: NodeOption = None,
    secrets: PeerSecrets,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one node may take.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """Have living agents bring blocks to their host memory: from their own disks, or from other agents.

    By hash, or those of a job's prompts. Blocks that some agent has computed are found; nothing is computed. Loads of
    running steps go first, and nothing that is needed sooner makes room. Status 3 if not all are there in the end.
    """
    from spillway.cli import kv_warm

    target = Place(kv_index).target(node, secrets)
    raise typer.Exit(kv_warm.warm(target, hashes or [], prompts.lines(), timeout_s=timeout, as_json=json))
