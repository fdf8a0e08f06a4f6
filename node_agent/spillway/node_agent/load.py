"""From a checkpoint and budgets to a running engine."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from spillway.api.errors import SpillwayError
from spillway.kernels.cpu.compile import warm_up
from spillway.kvstore import BlockStore, JobPlan, KVIdentity, KVStoreError, StoreConfig
from spillway.node_agent.blocks import BlockManager
from spillway.node_agent.checkpoint import Checkpoint
from spillway.node_agent.completion import Limits
from spillway.node_agent.container import usable_cpus
from spillway.node_agent.engine import Engine
from spillway.node_agent.graphs import DecodeGraphs, graphs_wanted
from spillway.node_agent.models.decoder import Decoder
from spillway.node_agent.models.spec import DecoderSpec
from spillway.node_agent.models.weights import LoadOptions
from spillway.node_agent.pool import allocate_pool, block_bytes
from spillway.node_agent.rank import Rank
from spillway.node_agent.scheduler import Scheduler, SchedulerConfig
from spillway.node_agent.sharing import SharingConfig, open_shared
from spillway.node_agent.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DeviceError(SpillwayError):
    """The asked device is not there."""


class TierError(SpillwayError):
    """The host or disk tier cannot be opened as asked."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to run a model on this machine. Budgets in bytes; a tier with a budget of zero does not exist.

    ``kv_policy``: "plan" keeps, writes and fetches KV by what the coming lines need, else one of the store's evictions.
    ``private``: the lines come in order of their prefixes, and nobody else will ask for their KV, now or later: what
    the plan does not need is then not written at all.
    """

    dtype: str
    device: str
    block_tokens: int
    device_kv_bytes: int
    host_kv_bytes: int
    disk_kv_bytes: int
    disk_dir: Path | None
    max_batch_tokens: int
    max_sequences: int
    sharing: SharingConfig | None = None
    kv_policy: str = "plan"
    private: bool = False


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A running engine and what its lines must keep to."""

    engine: Engine
    limits: Limits
    block_bytes: int


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        DeviceError: ``cuda`` was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is visible to torch", "Run with --device cpu, or check the driver.")
    return torch.device(name)


def check_compiler() -> None:
    """Triton builds what starts its kernels with a C compiler and Python's headers, on the first run.

    Raises:
        DeviceError: one of them is missing.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    missing = [] if compiler else ["a C compiler"]
    missing += [] if headers.is_file() else [f"Python's headers ({headers})"]
    if missing:
        hint = "Debian: apt-get install gcc libc6-dev python3-dev. Or run with --device cpu."
        raise DeviceError(f"kernels on CUDA are built with {' and '.join(missing)}, which this machine lacks", hint)


def load_engine(checkpoint: Checkpoint, weights_digest: str, config: EngineConfig) -> LoadedModel:
    """Load the weights, allocate the pool, open the store.

    Raises:
        ModelError: the checkpoint cannot be used.
        PoolTooSmallError: the device budget holds no useful number of blocks.
        DeviceError: the device is not there, or cannot be used.
        TierError: a budget holds no block, or the disk directory cannot be used.
    """
    device, dtype, spec = pick_device(config.device), DTYPES[config.dtype], checkpoint.spec
    if device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:  # torch knows of the machine's CPUs, not of a container's
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
        warm_up()
    elif device.type == "cuda":
        check_compiler()
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config)
    shape = (spec.layers, 2, spec.kv_heads, config.block_tokens, spec.head_dim)
    pool = allocate_pool(config.device_kv_bytes, shape, dtype, device)
    identity = kv_identity(spec, weights_digest, config.dtype, config.block_tokens)
    context_tokens = min(spec.max_positions, pool.shape[0] * config.block_tokens)
    decoder = Decoder.load(checkpoint, LoadOptions(dtype=dtype, device=device, context_tokens=context_tokens))
    store = _open_store(config, identity, block_bytes(shape, dtype))
    blocks = BlockManager(pool.shape[0], config.block_tokens)
    limits = SchedulerConfig(config.max_batch_tokens, min(config.max_sequences, config.max_batch_tokens))
    scheduler = Scheduler(limits, blocks, store, identity.root())
    graphs = None
    if device.type == "cuda" and graphs_wanted():
        graphs = DecodeGraphs(decoder, pool, limits.max_sequences, context_tokens)
    engine = Engine(scheduler, Rank(decoder, pool, store, graphs), tokenizer, store)
    limits_of_lines = Limits(spec.max_positions, engine.pool_tokens, spec.vocab)
    return LoadedModel(engine, limits_of_lines, block_bytes(shape, dtype))


def kv_identity(spec: DecoderSpec, weights_digest: str, dtype: str, block_tokens: int) -> KVIdentity:
    """Whose blocks an engine makes with these settings. ``weights_digest``: of the checkpoint, hex."""
    return KVIdentity(
        weights_digest=weights_digest,
        kv_dtype=dtype,
        kv_quantization="none",
        block_tokens=block_tokens,
        layers=(0, spec.layers),
        tensor_rank=0,
        tensor_size=1,
        positions_digest=spec.positions_digest().hex(),
    )


def _open_store(config: EngineConfig, identity: KVIdentity, size: int) -> BlockStore | None:
    if not config.host_kv_bytes and not config.disk_kv_bytes:
        return None
    index, peers, planned = None, None, config.kv_policy == "plan"
    try:
        if config.sharing is not None:
            index, peers = open_shared(config.sharing, identity, size)
        settings = StoreConfig(
            size,
            identity,
            host_bytes=config.host_kv_bytes,
            disk_bytes=config.disk_kv_bytes,
            disk_dir=config.disk_dir,
            eviction="lru" if planned else config.kv_policy,
            peers=peers,
        )
        store = BlockStore.open(settings, index)
    except KVStoreError as error:
        if index is not None:
            index.close()
        hint = f"One block is {size} bytes. Change --host-kv, --disk-kv or --disk-dir; 0 leaves a tier out."
        raise TierError(f"the KV store cannot be opened: {error}", hint) from error
    if planned:
        store.follow(JobPlan(whole=config.private))
    return store
