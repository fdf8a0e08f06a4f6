"""`spillway size`: the arithmetic of KV memory that people do by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from difflib import get_close_matches

from rich import box
from rich.console import Console
from rich.table import Table

from spillway.api.errors import SpillwayError
from spillway.cli.gpus import GPU_MEMORY_GIB, MODELS, ModelShape
from spillway.cli.sizes import format_size

WEIGHT_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0}
KV_BITS = {"float32": 32.0, "bfloat16": 16.0, "fp8": 8.0, "int4": 4.5}
"""int4 in groups of 64 with a 16-bit scale and zero each: 4.5 bits an element."""
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8", "int4": "int4"}
WORKING_SHARE = 0.90
"""Share of a GPU's memory for weights and KV; the rest is for activations, the allocator and the driver."""


class UnknownGpuError(SpillwayError):
    """A GPU that is not in the table."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What one GPU holds of one model. ``tokens`` is 0 where the weights alone do not fit."""

    gpu: str
    memory_gib: float
    weight_dtype: str
    kv_dtype: str
    weight_bytes: int
    kv_bytes_per_token: float
    tokens: int
    full_contexts: float


def find_model(name: str) -> ModelShape:
    """A shape from the table by name, or read from the config of a local folder or hub id.

    Raises:
        ModelError: neither in the table nor a checkpoint that can be read.
    """
    known = MODELS.get(name.lower())
    if known is not None:
        return known
    from spillway.node_agent.checkpoint import find_folder, load_config
    from spillway.node_agent.models.registry import spec_of

    spec = spec_of(load_config(find_folder(name)))
    return ModelShape(name, spec.layers, spec.kv_heads, spec.head_dim, spec.weight_count(), spec.max_positions)


def gpu_memory_gib(name: str) -> float:
    """Memory of a GPU of the table, or of a size such as ``24`` or ``24GiB`` in GiB.

    Raises:
        UnknownGpuError: neither.
    """
    by_name = {gpu.lower(): memory for gpu, memory in GPU_MEMORY_GIB.items()}
    if name.lower() in by_name:
        return by_name[name.lower()]
    try:
        gib = float(name.lower().removesuffix("gib").removesuffix("gb"))
    except ValueError:
        gib = 0.0
    if not 0 < gib < 10_000:
        close = get_close_matches(name.lower(), by_name, n=3)
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise UnknownGpuError(
            f"{name!r} is no GPU that the table knows",
            f"{hint}Known: {', '.join(GPU_MEMORY_GIB)}; or give its memory, such as 24GiB.",
        )
    return gib


def fit(model: ModelShape, gpu: str, weight_dtype: str, kv_dtype: str) -> Fit:
    """How many tokens of KV are left on a GPU beside the weights."""
    memory_gib = gpu_memory_gib(gpu)
    weight_bytes = int(model.weights * WEIGHT_BITS[weight_dtype] / 8)
    per_token = model.kv_bytes_per_token(KV_BITS[kv_dtype])
    tokens = max(0, int((memory_gib * 2**30 * WORKING_SHARE - weight_bytes) / per_token))
    return Fit(gpu, memory_gib, weight_dtype, kv_dtype, weight_bytes, per_token, tokens, tokens / model.max_positions)


def print_sizes(model: ModelShape, gpus: list[str], dtype: str | None, *, as_json: bool) -> None:
    """The table for the named GPUs (all when none is named), for the usual pairs of dtypes or the asked one."""
    pairs = (
        [(dtype, dtype if dtype in KV_BITS else "bfloat16")]
        if dtype
        else [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "fp8"), ("bfloat16", "int4")]
    )
    fits = [fit(model, gpu, weights, kv) for gpu in gpus or GPU_MEMORY_GIB for weights, kv in pairs]
    if as_json:
        print(json.dumps({"model": asdict(model), "fits": [asdict(each) for each in fits]}, indent=2))
        return
    console = Console()
    console.print(
        f"[bold]{model.name}[/]: {model.weights / 1e9:.3g} B weights, context {model.max_positions:,} tokens\n"
        f"KV per token = 2 · {model.layers} layers · {model.kv_heads} KV heads · {model.head_dim} head dim · bytes: "
        + ", ".join(f"{format_size(model.kv_bytes_per_token(bits))} {name}" for name, bits in KV_BITS.items())
        + "\nOne 16-token block: "
        + ", ".join(f"{format_size(16 * model.kv_bytes_per_token(bits))} {name}" for name, bits in KV_BITS.items())
    )
    table = Table("GPU", "weights", "KV", "KV/token", "tokens that fit", "contexts", box=box.SIMPLE_HEAD)
    for each in fits:
        table.add_row(
            f"{each.gpu} ({each.memory_gib:g} GiB)" if each.gpu in GPU_MEMORY_GIB else each.gpu,
            f"{format_size(each.weight_bytes)} {SHORT[each.weight_dtype]}",
            SHORT[each.kv_dtype],
            format_size(each.kv_bytes_per_token),
            f"{each.tokens:,}" if each.tokens else "none: weights",
            f"{each.full_contexts:.1f}" if each.tokens else "-",
        )
    console.print(table)
    console.print(
        f"{WORKING_SHARE:.0%} of the memory is counted for weights and KV. What does not fit spills to host and disk."
    )
