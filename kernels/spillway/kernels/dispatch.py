"""The ops, and which implementation runs them: CUDA tensors go to Triton, CPU tensors to the compiled twins.

``SPILLWAY_KERNELS`` forces one, read once at import: ``twin`` (CPU tensors only) or ``triton`` (CPU tensors run under
Triton's interpreter: exact, and thousands of times slower).

Every op takes the whole pool ``[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]`` (C-contiguous) and a layer
number. Block tables and context lengths are int32, slots and positions int64, all on the pool's device. Query head h
reads key head ``h // (query_heads // kv_heads)``. ``out=`` and ``lse=`` are written in place where given. A log-sum-exp
is natural, float32, ``[rows, query heads]``; a row that sees no key gives zeros and a log-sum-exp of -inf.

All ops raise KernelShapeError, KernelDtypeError or KernelValueError on tensors that do not fit together; block ids,
slots and positions are trusted, since checking them would cost a pass over data that may be on a GPU.
"""

import importlib
import os
import sys
from types import ModuleType

from torch import Tensor

from spillway.kernels.errors import BackendError
from spillway.kernels.params import AttentionParams
from spillway.kernels.quantization import QuantFormat

_FORCED = os.environ.get("SPILLWAY_KERNELS") or None
_modules: dict[str, ModuleType] = {}  # device type -> module that holds the ops


def _load(device_type: str) -> ModuleType:
    if _FORCED not in (None, "twin", "triton"):
        raise BackendError(f"SPILLWAY_KERNELS must be 'twin' or 'triton', got {_FORCED!r}")
    if _FORCED == "twin" and device_type != "cpu":
        raise BackendError(f"SPILLWAY_KERNELS=twin: the twins take CPU tensors, got {device_type}")
    if device_type == "cpu" and _FORCED != "triton":
        return importlib.import_module("spillway.kernels.cpu")
    if device_type == "cpu":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError("Triton was imported before TRITON_INTERPRET=1 was set: it cannot interpret any more")
        os.environ["TRITON_INTERPRET"] = "1"
    elif device_type != "cuda":
        raise BackendError(f"no kernels for device {device_type!r}")
    try:
        return importlib.import_module("spillway.kernels.ops")
    except ModuleNotFoundError as error:
        raise BackendError("the Triton kernels need the 'triton' package") from error


def _ops(tensor: Tensor) -> ModuleType:
    device_type = tensor.device.type
    module = _modules.get(device_type)
    if module is None:
        module = _modules[device_type] = _load(device_type)
    return module


def on_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels: on CUDA, and on a CPU that interprets them."""
    return tensor.device.type == "cuda" or _FORCED == "triton"


def flash_prefill(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    params: AttentionParams,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of a chunk of each sequence's queries over its paged keys and values, which hold the chunk already.

    Online softmax over tiles (FlashAttention, Dao et al. 2022, algorithm 1) on paged keys (PagedAttention, Kwon et
    al. 2023).

    Args:
        q: ``[T, query heads, head_dim]``, the chunks of all sequences one after another. May be a strided view of a
            fused projection as long as heads and channels are contiguous.
        pool: KV pool, see above.
        layer: layer of the pool.
        block_tables: ``[S, max blocks]`` int32.
        query_starts: ``[S + 1]`` int32, where each sequence's rows start in q.
        context_lens: ``[S]`` int32, tokens of KV per sequence, the chunk included. Row i of a chunk of n stands at
            position ``context - n + i``.
        params: the layer's settings.
        out: ``[T, query heads, head_dim]`` to write into.
        lse: ``[T, query heads]`` float32 to write the log-sum-exp into.

    Returns:
        ``out``, in q's dtype.
    """
    return _ops(q).flash_prefill(q, pool, layer, block_tables, query_starts, context_lens, params, out=out, lse=lse)


def paged_decode(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    params: AttentionParams,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence, at position ``context - 1``, over its paged keys and values.

    The context is split into fixed spans that are merged in order (FlashDecoding), so a row's value never depends on
    what shares the batch.

    Args:
        q: ``[S, query heads, head_dim]``, strided as in `flash_prefill`.
        pool, layer, block_tables, context_lens, params: as in `flash_prefill`.
        out: ``[S, query heads, head_dim]`` to write into.
        lse: ``[S, query heads]`` float32 to write the log-sum-exp into.

    Returns:
        ``out``, in q's dtype.
    """
    return _ops(q).paged_decode(q, pool, layer, block_tables, context_lens, params, out=out, lse=lse)


def cascade_decode(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    shared_tokens: int,
    params: AttentionParams,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """`paged_decode` for sequences that begin with the same blocks: their KV is read once for the whole batch.

    Args:
        shared_tokens: how many first tokens all sequences share, block for block; a multiple of block_tokens and at
            most the shortest context. The block ids are read from row 0 of block_tables.
        q, pool, layer, block_tables, context_lens, params, out, lse: as in `paged_decode`.

    Returns:
        ``out``, in q's dtype.
    """
    return _ops(q).cascade_decode(q, pool, layer, block_tables, context_lens, shared_tokens, params, out=out, lse=lse)


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Args:
        out_a, out_b: ``[rows, heads, head_dim]``.
        lse_a, lse_b: ``[rows, heads]`` float32.
        out, lse: where to write; may be one side's own tensors.

    Returns:
        Merged output, in out_a's dtype, and its log-sum-exp.
    """
    return _ops(out_a).merge_states(out_a, lse_a, out_b, lse_b, out=out, lse=lse)


def score_sums(
    q: Tensor,
    pool: Tensor,
    layer: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    lse: Tensor,
    params: AttentionParams,
    sums: Tensor,
) -> Tensor:
    """Add to every cached token the attention that this chunk's queries pay to it (H2O, Zhang et al. 2023, section 4).

    Args:
        lse: ``[T, query heads]`` float32, from the attention op on the same arguments.
        sums: ``[S, kv heads, tokens]`` float32 with ``tokens >= max(context_lens)``: added to in place, over the
            query heads of each kv head. Columns beyond a sequence's context are left alone.
        q, pool, layer, block_tables, query_starts, context_lens, params: as in `flash_prefill`.

    Returns:
        ``sums``.
    """
    return _ops(q).score_sums(q, pool, layer, block_tables, query_starts, context_lens, lse, params, sums)


def write_kv(k: Tensor, v: Tensor, pool: Tensor, layer: int, slots: Tensor, *, kv_scales: Tensor | None = None) -> None:
    """Write each token's keys and values into its slot.

    Args:
        k, v: ``[T, kv_heads, head_dim]``, heads and channels contiguous.
        pool, layer: where to.
        slots: ``[T]`` int64, block times block_tokens plus offset; a negative slot is skipped.
        kv_scales: ``[2, kv_heads]`` float32 for fp8 and int8 pools, see `AttentionParams`; values are divided by them,
            rounded and saturated.
    """
    _ops(k).write_kv(k, v, pool, layer, slots, kv_scales=kv_scales)


def rope_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    pool: Tensor,
    layer: int,
    slots: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    kv_scales: Tensor | None = None,
) -> None:
    """Split a fused projection, normalize (where asked) and rotate q and k, and write k and v into the pool.

    Args:
        qkv: ``[T, (query heads + 2 kv heads) * head_dim]``: all q heads, all k heads, all v heads. The finished
            q is left in place; the k and v parts are unchanged.
        cos_sin: ``[positions, R]`` float32, cosines in the first R/2 columns and sines in the rest, R <= head_dim. The
            first R channels of a head rotate, channel i paired with i + R/2 (RoPE, Su et al. 2021, rotate-half order).
        positions: ``[T]`` int64, rows of cos_sin.
        slots: ``[T]`` int64, as in `write_kv`; q is finished even where the slot is negative.
        q_norm, k_norm: ``[head_dim]`` weights of an RMS norm over each head before rotation (Qwen 3), or None.
        eps: of those norms.
        kv_scales: as in `write_kv`.
    """
    _ops(qkv).rope_write_kv(
        qkv, cos_sin, positions, pool, layer, slots, q_norm=q_norm, k_norm=k_norm, eps=eps, kv_scales=kv_scales
    )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``weight * (h / sqrt(mean(h^2) + eps))`` over the last dimension, accumulated in float32, as LlamaRMSNorm does.

    Args:
        x: ``[T, H]``.
        weight: ``[H]``.
        eps: added to the mean square.
        residual: ``[T, H]``; where given, h = residual + x, rounded to the dtype and left in residual. Else h = x.
        out: ``[T, H]`` to write into; may be x.

    Returns:
        ``out``, in x's dtype.
    """
    return _ops(x).rms_norm(x, weight, eps, residual=residual, out=out)


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` of a fused projection ``[T, 2 I]`` (gate first) as ``[T, I]``."""
    return _ops(gate_up).silu_mul(gate_up, out=out)


def copy_blocks(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy blocks ``src[i]`` to ``dst[i]`` within the pool; ids int64 ``[n]``, no block both read and written."""
    _ops(pool).copy_blocks(pool, src, dst)


def gather_blocks(pool: Tensor, ids: Tensor, staging: Tensor) -> None:
    """Copy blocks ``ids`` (int64 ``[n]``) of the pool, in that order, into contiguous ``staging [n, ...block]``."""
    _ops(pool).gather_blocks(pool, ids, staging)


def scatter_blocks(pool: Tensor, ids: Tensor, staging: Tensor) -> None:
    """Copy contiguous ``staging [n, ...block]`` into blocks ``ids`` (int64 ``[n]``, each once) of the pool."""
    _ops(pool).scatter_blocks(pool, ids, staging)


def quantize(blocks: Tensor, quant_format: QuantFormat, *, out: Tensor | None = None) -> Tensor:
    """Code whole KV blocks into bytes, keys per channel and values per token.

    The layout is fixed in `spillway.kernels.quantization`.

    Args:
        blocks: ``[n, layers, 2, kv_heads, block_tokens, head_dim]`` contiguous, float32, bfloat16 or float16.
        quant_format: the code.
        out: ``[n, quantized_block_bytes(...)]`` uint8 to write into.

    Returns:
        ``out``: one self-contained row of bytes per block.
    """
    return _ops(blocks).quantize(blocks, quant_format, out=out)


def dequantize(packed: Tensor, quant_format: QuantFormat, out: Tensor) -> Tensor:
    """Undo `quantize` into ``out [n, layers, 2, kv_heads, block_tokens, head_dim]``, of any of its dtypes."""
    return _ops(packed).dequantize(packed, quant_format, out)
