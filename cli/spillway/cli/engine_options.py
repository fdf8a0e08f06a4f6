"""How to run a model on this machine: what the user asked for, and this machine's defaults for the rest."""

from __future__ import annotations

from pathlib import Path

import psutil

from spillway.cli.options import Dtype, EngineOptions
from spillway.cli.sizes import format_size
from spillway.kernels import decode_scratch_bytes
from spillway.node_agent.block_moves import STAGING_BYTES
from spillway.node_agent.container import available_memory_bytes
from spillway.node_agent.graphs import MAX_ROWS, bucket_of
from spillway.node_agent.load import DTYPES, DeviceError, EngineConfig, LoadedModel, pick_device
from spillway.node_agent.models.spec import DecoderSpec

DEFAULT_DISK_BYTES = 16 << 30


def engine_config(options: EngineOptions, spec: DecoderSpec, dtype: str, default_disk_dir: Path) -> EngineConfig:
    """The engine's configuration, with this machine's defaults for what the user left open.

    Raises:
        DeviceError: the device is not there, or too small.
    """
    device = pick_device(options.device).type
    host_memory = available_memory_bytes()
    max_batch_tokens = options.max_batch_tokens or (1024 if device == "cpu" else 8192)
    device_kv = options.device_kv_bytes
    if device_kv is None:
        if device == "cpu":
            device_kv = min(4 << 30, host_memory // 4)
        else:
            device_kv = left_for_kv_bytes(_free_cuda_bytes(), spec, dtype, max_batch_tokens, options.max_sequences)
    host_kv = options.host_kv_bytes
    if host_kv is None:
        host_kv = min(4 << 30, host_memory // 4) if device == "cpu" else host_memory // 2
    disk_kv = options.disk_kv_bytes
    if disk_kv is None:
        disk_kv = (
            0
            if options.disk_dir is None
            else min(DEFAULT_DISK_BYTES, psutil.disk_usage(_existing(options.disk_dir)).free // 2)
        )
    return EngineConfig(
        dtype=dtype,
        device=device,
        block_tokens=options.block_tokens,
        device_kv_bytes=device_kv,
        host_kv_bytes=host_kv,
        disk_kv_bytes=disk_kv,
        disk_dir=(options.disk_dir or default_disk_dir) if disk_kv else None,
        max_batch_tokens=max_batch_tokens,
        max_sequences=options.max_sequences,
        kv_policy=options.kv_policy.value,
    )


def _existing(path: Path) -> str:
    """The nearest folder that exists, for a directory that may still have to be made."""
    return str(next(each for each in (path, *path.absolute().parents) if each.exists()))


def chosen_dtype(dtype: Dtype | None, device: str) -> str:
    """Of weights and KV: what was asked for, or the default of a device as people name it. Raises DeviceError."""
    if dtype is not None:
        return dtype.value
    return "float32" if pick_device(device).type == "cpu" else "bfloat16"


def left_for_kv_bytes(free_bytes: int, spec: DecoderSpec, dtype: str, max_batch_tokens: int, max_rows: int) -> int:
    """What of a GPU's free memory is left for KV beside the weights and the largest step.

    A step holds, for each of its rows, the residual and what a layer makes of it, and for each sampled row its logits
    in the model's dtype and in float32 and the partial results of its attention. CUDA graphs hold the same for their
    largest bucket once more. Positions stand in a table as long as the model's context, or as all KV if that is less. A
    twentieth of the memory stays free, for fragments and what libraries take.

    Raises:
        DeviceError: the weights alone do not fit.
    """
    size = DTYPES[dtype].itemsize
    row = (4 * spec.hidden + 2 * (spec.heads + spec.kv_heads) * spec.head_dim + 3 * spec.intermediate) * size
    sampled = spec.vocab * (size + 4) + decode_scratch_bytes(1, spec.heads, spec.kv_heads, spec.head_dim)
    graphs = bucket_of(min(max_rows, MAX_ROWS)) * (row + sampled)
    step = max_batch_tokens * row + min(max_rows, max_batch_tokens) * sampled + graphs + STAGING_BYTES
    positions = min(spec.max_positions, free_bytes // (2 * spec.layers * spec.kv_heads * spec.head_dim * size))
    weights = spec.weight_count() * size + positions * spec.positions.rotary_dim * 4
    left = int(free_bytes * 0.95) - weights - step
    if left <= 0:
        raise DeviceError(
            f"of {format_size(free_bytes)} GPU memory, weights need {format_size(weights)}, a step {format_size(step)}",
            "Take a GPU with more memory, a narrower --dtype, or fewer --max-batch-tokens.",
        )
    return left


def _free_cuda_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def describe_tiers(loaded: LoadedModel, config: EngineConfig) -> str:
    """The tiers in one line."""
    tiers = [f"device {format_size(config.device_kv_bytes)} ({loaded.limits.pool_tokens:,} tokens)"]
    tiers += [f"host {format_size(config.host_kv_bytes)}"] if config.host_kv_bytes else []
    tiers += [f"disk {format_size(config.disk_kv_bytes)} in {config.disk_dir}"] if config.disk_kv_bytes else []
    return f"KV tiers on {config.device}: {', '.join(tiers)}; {config.max_batch_tokens} tokens a step"
