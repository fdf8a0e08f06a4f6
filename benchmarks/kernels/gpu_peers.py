"""Other implementations of attention, on contiguous keys and values, as calls that can be timed."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], object]
BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """torch's attention of one backend; q ``[B, query heads, rows, D]``, k and v ``[B, kv heads, keys, D]``.

    Where a backend does not take grouped heads, keys and values are repeated before the clock starts.
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and backend is SDPBackend.EFFICIENT_ATTENTION:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return call


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """FlexAttention, compiled for these shapes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(lambda _batch, _head, i, j: i >= j, None, None, q.shape[2], k.shape[2], device="cuda")
    return lambda: attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def flashinfer_prefill(q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """FlashInfer's ragged prefill where it is installed; causal."""
    try:
        import flashinfer
    except ImportError:
        return None
    batch, heads, rows, dim = q.shape
    flat_q, flat_k, flat_v = (x.transpose(1, 2).reshape(-1, x.shape[1], dim).contiguous() for x in (q, k, v))
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * rows
    wrapper.plan(starts, starts, heads, k.shape[1], dim, causal=True, q_data_type=q.dtype)
    return lambda: wrapper.run(flat_q, flat_k, flat_v)


def flashinfer_decode(q: Tensor, pool: Tensor, tables: Tensor, tokens: int) -> Call | None:
    """FlashInfer's paged decode where it is installed; the pool is ours, of one layer, in FlashInfer's HND order."""
    try:
        import flashinfer
    except ImportError:
        return None
    sequences, heads, dim = q.shape
    blocks, _, _, kv_heads, block_tokens, _ = pool.shape
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=heads != kv_heads)
    pages = -(-tokens // block_tokens)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * pages
    last = torch.full((sequences,), (tokens - 1) % block_tokens + 1, dtype=torch.int32, device="cuda")
    wrapper.plan(starts, tables[:, :pages].flatten(), last, heads, kv_heads, dim, block_tokens, q_data_type=q.dtype)
    cache = pool.view(blocks, 2, kv_heads, block_tokens, dim)
    return lambda: wrapper.run(q, cache)


@contextlib.contextmanager
def freed() -> Iterator[None]:
    """Give the memory of a contender back before the next one."""
    try:
        yield
    finally:
        torch.cuda.empty_cache()
