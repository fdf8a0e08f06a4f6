"""Options that several commands share, as typer knows them. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
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


DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Element type of weights and KV. Default: float32 on CPU, bfloat16 on CUDA."),
]
BlockTokensOption = Annotated[int, typer.Option("--block-tokens", min=1, max=256, help="Tokens in one KV block.")]
KvIndexOption = Annotated[
    str | None,
    typer.Option(
        "--kv-index",
        metavar="URL",
        envvar="SPILLWAY_KV_INDEX",
        help="Redis where agents tell which blocks they have: redis://…, rediss://… with TLS, redis+cluster://… for a "
        "Redis Cluster. The variable keeps a password out of the list of processes.",
    ),
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run a model; None where a default is to be found out on this machine."""

    model: Annotated[str, typer.Option("--model", help="Checkpoint folder (safetensors) or Hugging Face hub id.")]
    dtype: DtypeOption = None
    device: Annotated[Device, typer.Option("--device", help="Where to run.")] = Device.AUTO
    device_kv_bytes: Annotated[
        int | None,
        typer.Option(
            "--device-kv",
            parser=parse_size,
            metavar="SIZE",
            help="KV pool on the device, e.g. 512MiB. Default: a quarter of free memory, at most 4GiB; "
            "on CUDA most of what is free.",
        ),
    ] = None
    host_kv_bytes: Annotated[
        int | None,
        typer.Option(
            "--host-kv",
            parser=parse_size,
            metavar="SIZE",
            help="Host memory that KV spills to; 0 for none. Default: a quarter of free memory, at most 4GiB; "
            "half on CUDA.",
        ),
    ] = None
    disk_kv_bytes: Annotated[
        int | None,
        typer.Option(
            "--disk-kv",
            parser=parse_size,
            metavar="SIZE",
            help="Disk space that KV spills to. Default: none, or 16GiB where --disk-dir is given.",
        ),
    ] = None
    disk_dir: Annotated[
        Path | None,
        typer.Option(
            "--disk-dir",
            help="Where KV on disk lives. Given, it is kept and found again by later runs and agents; "
            "else it goes with this job or agent.",
        ),
    ] = None
    kv_policy: Annotated[
        KvPolicy,
        typer.Option(
            "--kv-policy",
            help="By what KV is kept below the device: by what the coming lines need, or, not looking ahead, by what "
            "was used last (lru) or last and often (arc).",
        ),
    ] = KvPolicy.PLAN
    block_tokens: BlockTokensOption = 16
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-batch-tokens",
            min=1,
            help="Tokens the model runs over in one step. Default: 1024 on CPU, 8192 on CUDA.",
        ),
    ] = None
    max_sequences: Annotated[int, typer.Option("--max-batch-size", min=1, help="Sequences that run at once.")] = 256
    seed: Annotated[int, typer.Option("--seed", help="Seed of lines that sample without one of their own.")] = 0
