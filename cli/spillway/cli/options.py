"""Options that several commands share, as typer knows them. Imports nothing heavy."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from spillway.cli.sizes import parse_size


class Dtype(StrEnum):
    """Element type of weights and KV."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class KvPolicy(StrEnum):
    """By what KV is kept, written and fetched."""

    PLAN = "plan"
    LRU = "lru"
    ARC = "arc"


ModelOption = Annotated[str, typer.Option(help="Checkpoint folder (safetensors) or Hugging Face hub id.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Element type of weights and KV. Default: float32 on CPU, bfloat16 on CUDA.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where to run.")]
DeviceKvOption = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="KV pool on the device, e.g. 512MiB. Default: a quarter of free memory, at most 4GiB; "
        "on CUDA most of what is free.",
    ),
]
HostKvOption = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Host memory that KV spills to; 0 for none. Default: a quarter of free memory, at most 4GiB; "
        "half on CUDA.",
    ),
]
DiskKvOption = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Disk space that KV spills to. Default: none, or 16GiB where --disk-dir is given.",
    ),
]
KvPolicyOption = Annotated[
    KvPolicy,
    typer.Option(
        help="By what KV is kept below the device: by what the coming lines need, or, not looking ahead, by what was "
        "used last (lru) or last and often (arc)."
    ),
]
BlockTokensOption = Annotated[int, typer.Option(min=1, max=256, help="Tokens in one KV block.")]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens the model runs over in one step. Default: 1024 on CPU, 8192 on CUDA."),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Sequences that run at once.")]
SeedOption = Annotated[int, typer.Option(help="Seed of lines that sample without one of their own.")]

KvIndexOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="SPILLWAY_KV_INDEX",
        help="Redis where agents tell which blocks they have: redis://…, rediss://… with TLS, redis+cluster://… for a "
        "Redis Cluster. The variable keeps a password out of the list of processes.",
    ),
]
PeerTokenFileOption = Annotated[
    Path | None, typer.Option(help="File with the secret that agents share among themselves, 16 bytes or more.")
]
PeerTlsCertOption = Annotated[Path | None, typer.Option(help="Certificate that we show to agents' block servers, PEM.")]
PeerTlsKeyOption = Annotated[Path | None, typer.Option(help="Its private key, PEM.")]
PeerTlsCaOption = Annotated[
    Path | None, typer.Option(help="The authority that certifies all agents' block servers and their callers, PEM.")
]
PeerTlsNameOption = Annotated[
    str, typer.Option(help="The name in those certificates. Default: the host of each agent's address.")
]
