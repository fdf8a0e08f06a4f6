"""What the attention kernels are compiled for: shapes and features, checked once and passed as one constant."""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from spillway.kernels.errors import KernelDtypeError, KernelShapeError
from spillway.kernels.params import AttentionParams
from spillway.kernels.tuning.gpu import INTERPRETED, gpu_of, power_of_two
from spillway.kernels.tuning.tables import TileKey

LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 256

_COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_POOL_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16, torch.float8_e4m3fn: 8, torch.int8: 8}


@dataclass(frozen=True)
class Layout:
    """One compiled variant of attention: everything the compiler may fold.

    Attributes:
        query_heads, kv_heads, head_dim, block_tokens: the model's and the pool's shape.
        group: query heads that share a kv head.
        padded_dim: head_dim up to the power of two that a tile needs; the rest is masked.
        pool_bits: bits per stored value.
        causal, window, sinks, soft_cap, alibi, kv_scales: features that are compiled in or away.
        operand: dtype of both matrix products' operands.
        precision: how an fp32 product is computed ("ieee" in the interpreter, three tf32 products on a GPU).
        interpreted: the interpreter truncates where hardware rounds, so the kernels round for it.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    group: int
    padded_dim: int
    pool_bits: int
    causal: bool
    window: bool
    sinks: bool
    soft_cap: bool
    alibi: bool
    kv_scales: bool
    operand: tl.dtype
    precision: str
    interpreted: bool

    @property
    def tile_key(self) -> TileKey:
        """What the tuning tables know this variant by."""
        return TileKey(
            self.padded_dim, self.operand.primitive_bitwidth, self.pool_bits, biased=self.soft_cap or self.alibi
        )


@dataclass(frozen=True, slots=True)
class Scalars:
    """The numbers of a layer's `AttentionParams` as the kernels want them: softmax is computed in base 2.

    Attributes:
        factor: multiplies q.k. With a soft cap it makes the exponent of tanh's e^(2x/cap), else it carries log2(e).
        cap: the soft cap in log2 units, or 0.
        window, sinks: in tokens; 0 where unused.
    """

    factor: float
    cap: float
    window: int
    sinks: int


def scalars_of(params: AttentionParams) -> Scalars:
    """The kernel scalars of a layer."""
    window = params.window or 0
    sinks = params.sinks if window else 0
    if params.soft_cap is None:
        return Scalars(params.scale * LOG2_E, 0.0, window, sinks)
    return Scalars(2.0 * LOG2_E * params.scale / params.soft_cap, params.soft_cap * LOG2_E, window, sinks)


def operand_dtype(q_dtype: torch.dtype, pool_dtype: torch.dtype) -> tl.dtype:
    """Dtype of the products' operands.

    fp8 widens to fp16 in one instruction for two values and to bf16 only by way of fp32, and e4m3 fits in fp16
    exactly; the interpreter cannot calculate in bf16 at all.
    """
    if q_dtype is torch.bfloat16 and INTERPRETED:
        return tl.float32
    if pool_dtype is torch.float8_e4m3fn and q_dtype is not torch.float32:
        return tl.float16
    return _COMPUTE[q_dtype]


def layout_of(q: Tensor, pool: Tensor, params: AttentionParams) -> Layout:
    """Check query, pool and settings against each other and name the variant they need.

    Raises:
        KernelShapeError: shapes or strides that do not fit together.
        KernelDtypeError: dtypes that the kernels do not take, or fp8 on a GPU without it (before capability 8.9).
    """
    if q.dim() != 3 or q.stride(2) != 1 or (q.shape[1] > 1 and q.stride(1) != q.shape[2]):
        raise KernelShapeError(f"q must be [rows, heads, head_dim] with heads and channels contiguous, got {_say(q)}")
    check_pool(pool)
    query_heads, head_dim = q.shape[1], q.shape[2]
    kv_heads, block_tokens = pool.shape[3], pool.shape[4]
    if pool.shape[5] != head_dim or query_heads % kv_heads:
        raise KernelShapeError(f"q {_say(q)} does not fit the pool {_say(pool)}")
    if head_dim > MAX_HEAD_DIM:
        raise KernelShapeError(f"head_dim can be at most {MAX_HEAD_DIM}, got {head_dim}")
    if q.dtype not in _COMPUTE:
        raise KernelDtypeError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    if _POOL_BITS[pool.dtype] > 8 and pool.dtype is not q.dtype and q.dtype is not torch.float32:
        raise KernelDtypeError(f"a pool of {pool.dtype} takes queries of that dtype or float32, got {q.dtype}")
    if pool.dtype is torch.float8_e4m3fn and gpu_of(pool.device).capability < (8, 9):
        raise KernelDtypeError("fp8 pools need compute capability 8.9 or later; use int8 here")
    if params.alibi_slopes is not None and params.alibi_slopes.shape[0] != query_heads:
        raise KernelShapeError(f"{params.alibi_slopes.shape[0]} slopes for {query_heads} query heads")
    if params.kv_scales is not None and params.kv_scales.shape[1] != kv_heads:
        raise KernelShapeError(f"{params.kv_scales.shape[1]} kv scales for {kv_heads} kv heads")
    return Layout(
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        group=query_heads // kv_heads,
        padded_dim=max(16, power_of_two(head_dim)),
        pool_bits=_POOL_BITS[pool.dtype],
        causal=params.causal,
        window=params.window is not None,
        sinks=params.window is not None and params.sinks > 0,
        soft_cap=params.soft_cap is not None,
        alibi=params.alibi_slopes is not None,
        kv_scales=params.kv_scales is not None,
        operand=operand_dtype(q.dtype, pool.dtype),
        precision="ieee" if INTERPRETED else "tf32x3",
        interpreted=INTERPRETED,
    )


def check_pool(pool: Tensor) -> None:
    """A contiguous 6-dimensional KV pool of a known dtype whose rows can be counted in 32 bits."""
    if pool.dim() != 6 or pool.shape[2] != 2 or not pool.is_contiguous():
        raise KernelShapeError(
            f"a pool is contiguous [blocks, layers, 2, kv_heads, block_tokens, head_dim], got {_say(pool)}"
        )
    if pool.dtype not in _POOL_BITS:
        raise KernelDtypeError(f"no kernels for a pool of {pool.dtype}")
    if pool.numel() // pool.shape[5] >= 2**31:
        raise KernelShapeError(f"a pool can hold at most 2^31 rows of a head, got {_say(pool)}")


def check_tables(block_tables: Tensor, context_lens: Tensor, query_starts: Tensor | None = None) -> None:
    """Index tensors of one batch: int32, of matching lengths."""
    sequences = context_lens.shape[0]
    if block_tables.dim() != 2 or block_tables.shape[0] != sequences or block_tables.stride(1) != 1:
        raise KernelShapeError(f"block_tables must be [{sequences}, blocks] in rows, got {_say(block_tables)}")
    if query_starts is not None and query_starts.shape != (sequences + 1,):
        raise KernelShapeError(f"query_starts must be [{sequences + 1}], got {_say(query_starts)}")
    for tensor in (block_tables, context_lens) if query_starts is None else (block_tables, context_lens, query_starts):
        if tensor.dtype is not torch.int32:
            raise KernelDtypeError(f"block tables, lengths and starts are int32, got {tensor.dtype}")


def result_like(q: Tensor, out: Tensor | None, lse: Tensor | None) -> Tensor:
    """Where attention is written: ``out`` if it fits q, else a new tensor; ``lse`` is checked beside it."""
    if lse is not None and (lse.shape != q.shape[:2] or lse.dtype is not torch.float32 or not lse.is_contiguous()):
        raise KernelShapeError(f"lse must be contiguous float32 {tuple(q.shape[:2])}, got {lse.dtype} {_say(lse)}")
    if out is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.shape != q.shape or out.stride(2) != 1 or (q.shape[1] > 1 and out.stride(1) != q.shape[2]):
        raise KernelShapeError(f"out must be {tuple(q.shape)} with heads contiguous, got {_say(out)}")
    if out.dtype is not q.dtype:
        raise KernelDtypeError(f"out is {out.dtype} but q is {q.dtype}")
    return out


def _say(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} with strides {tensor.stride()}"


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments that every attention op has in common, as `spillway.kernels.paged_decode` describes them."""

    q: Tensor
    pool: Tensor
    layer: int
    block_tables: Tensor
    context_lens: Tensor
    params: AttentionParams

    @property
    def rows_per_block(self) -> int:
        """Vectors of head_dim in one block of the pool, all layers."""
        return self.pool.stride(0) // self.pool.shape[5]

    @property
    def alibi_slopes(self) -> Tensor:
        """The slopes, or any tensor where the layout compiles them away."""
        return self.q if self.params.alibi_slopes is None else self.params.alibi_slopes

    @property
    def kv_scales(self) -> Tensor:
        """The scales, or any tensor where the layout compiles them away."""
        return self.q if self.params.kv_scales is None else self.params.kv_scales
