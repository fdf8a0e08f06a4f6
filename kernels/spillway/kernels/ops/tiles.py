"""The steps that every attention kernel is made of: find rows in pages, score a tile, fold it into a running softmax.

One tile is ``[rows, keys]``. Rows are query vectors that share a kv head (several tokens times the heads of a group),
keys are consecutive tokens of one sequence; since a tile may span several pages, each key looks up its own page.

Softmax is computed in base 2, with the running maximum started at a finite floor: a key that is not visible scores
-inf, and ``exp2(-inf - floor)`` is an exact 0, so a row that has seen nothing needs no special case before the end.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1.0e30)
LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def narrow(x, dtype: tl.constexpr, interpreted: tl.constexpr):
    """fp32 to a narrower float, to the nearest even. The interpreter would truncate: it gets rounded bits."""
    if interpreted and dtype == tl.bfloat16:
        x = _round_bits(x, 16)
    if interpreted and dtype == tl.float8e4nv:
        # Below 2^-6 e4m3 has steps of 2^-9; above it keeps three bits of mantissa.
        steps = (x * 512.0 + 12582912.0) - 12582912.0
        x = tl.where(tl.abs(x) < 0.015625, steps / 512.0, _round_bits(x, 20))
    return x.to(dtype)


@triton.jit
def _round_bits(x, dropped: tl.constexpr):
    """x with its lowest bits rounded away; NaN stays as it is."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    bits = (bits >> dropped) << dropped
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def encode(x, dtype: tl.constexpr, interpreted: tl.constexpr):
    """fp32 to what a pool stores: rounded to the nearest even; fp8 and int8 saturate."""
    if dtype == tl.int8:
        x = tl.minimum(tl.maximum(x, -128.0), 127.0)
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no bits left for fractions
        return x.to(tl.int8)
    else:  # noqa: RET505 - the compiler needs both returns in one statement
        if dtype == tl.float8e4nv:
            x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        return narrow(x, dtype, interpreted)


@triton.jit
def head_bases(pool, layer, kv_head, layout: tl.constexpr):
    """Where the keys and the values of one layer and head start within page 0."""
    head_elements: tl.constexpr = layout.block_tokens * layout.head_dim
    k_base = pool + (layer.to(tl.int64) * 2 * layout.kv_heads + kv_head) * head_elements
    return k_base, k_base + layout.kv_heads * head_elements


@triton.jit
def row_mask(ok, d, layout: tl.constexpr):
    """Mask of a ``[rows, padded_dim]`` tile whose rows are wanted where ok."""
    mask = ok[:, None]
    if layout.padded_dim != layout.head_dim:
        mask = mask & (d < layout.head_dim)[None, :]
    return mask


@triton.jit
def load_tile(base, offsets, ok, d, layout: tl.constexpr, masked: tl.constexpr):
    """A ``[keys, padded_dim]`` tile of K or V in the dtype of the products; what is masked off is 0."""
    if masked:
        tile = tl.load(base + offsets, mask=row_mask(ok, d, layout), other=0.0)
    elif layout.padded_dim == layout.head_dim:
        tile = tl.load(base + offsets)
    else:
        tile = tl.load(base + offsets, mask=(d < layout.head_dim)[None, :], other=0.0)
    return tile.to(layout.operand)


@triton.jit
def key_offsets(table, n, ok, d, rows_per_block, layout: tl.constexpr, masked: tl.constexpr):
    """Offsets of keys n of one head. Rows of the pool are counted in 32 bits, elements (rows times head_dim) in 64."""
    if masked:
        page = tl.load(table + n // layout.block_tokens, mask=ok, other=0)
    else:
        page = tl.load(table + n // layout.block_tokens)
    rows = page * rows_per_block + n % layout.block_tokens
    return rows.to(tl.int64)[:, None] * layout.head_dim + d[None, :]


@triton.jit
def score_tile(q, k, n, positions, slopes, factor, cap, layout: tl.constexpr):
    """q.k with soft cap and ALiBi, in log2 units; without either the caller still has to multiply by factor."""
    s = tl.dot(q, tl.trans(k), input_precision=layout.precision)
    if layout.soft_cap:
        # cap * tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1), right at both ends: e^.. is 0 or inf there.
        s = cap - tl.fdiv(2.0 * cap, tl.exp2(s * factor) + 1.0)
    elif layout.alibi:
        s = s * factor
    if layout.alibi:
        s = s + slopes[:, None] * (n[None, :] - positions[:, None]).to(tl.float32)
    return s


@triton.jit
def visible(n, ok, positions, window, sinks, layout: tl.constexpr):
    """``[rows, keys]`` mask of `AttentionParams`; ok says which keys the tile really holds."""
    keep = ok[None, :]
    if layout.causal:
        keep = keep & (n[None, :] <= positions[:, None])
    if layout.window:
        near = n[None, :] > positions[:, None] - window
        if layout.sinks:
            near = near | (n < sinks)[None, :]
        keep = keep & near
    return keep


@triton.jit
def attend_tile(
    acc,  # [rows, padded_dim] f32, unnormalized output
    m,  # [rows] f32, running maximum in log2 units
    den,  # [rows] or, with spread_sum, [rows, keys] f32: running denominator
    q,  # [rows, padded_dim], in the products' dtype
    k_base,  # first key of this layer and head in page 0
    v_base,
    table,  # pages of this sequence, i32
    start,  # first key of the tile
    limit,  # first key that is not to be read
    positions,  # [rows] i32
    slopes,  # [rows] f32, ALiBi slopes in log2 units
    rows_per_block,
    window,
    sinks,
    factor,
    cap,
    layout: tl.constexpr,
    keys: tl.constexpr,
    masked: tl.constexpr,  # False: every key of the tile exists and every row sees it
    spread_sum: tl.constexpr,  # leave the denominator per column, for tiles whose columns lie across warps
):
    """Fold one tile of keys into (acc, m, l): FlashAttention-2 (Dao 2023), section 3.1, on paged keys."""
    d = tl.arange(0, layout.padded_dim)
    n = start + tl.arange(0, keys)
    ok = n < limit
    offsets = key_offsets(table, n, ok, d, rows_per_block, layout, masked)
    k = load_tile(k_base, offsets, ok, d, layout, masked)
    s = score_tile(q, k, n, positions, slopes, factor, cap, layout)
    if masked:
        s = tl.where(visible(n, ok, positions, window, sinks, layout), s, float("-inf"))
    if layout.soft_cap or layout.alibi:
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
    else:  # scaling inside the exponent is one fused multiply-add per score instead of two operations
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        p = tl.exp2(s * factor - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    den = den * alpha[:, None] + p if spread_sum else den * alpha + tl.sum(p, 1)
    v = load_tile(v_base, offsets, ok, d, layout, masked)
    acc = tl.dot(p.to(layout.operand), v, acc * alpha[:, None], input_precision=layout.precision)
    return acc, m_new, den


@triton.jit
def finish_rows(acc, m, den):
    """Normalized output and log-sum-exp in log2 units; zeros and -inf for rows that saw no key."""
    seen = den > 0.0
    den = tl.where(seen, den, 1.0)
    return acc / den[:, None], tl.where(seen, m + tl.log2(den), float("-inf"))
