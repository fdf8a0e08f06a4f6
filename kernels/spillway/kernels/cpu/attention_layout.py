"""What the attention kernels are told, and where they keep their scratch: one list of names for both sides.

Arguments are eight bytes each: int64, or float64 where a comment says so. Addresses are plain int64.
"""

from dataclasses import dataclass

from spillway.kernels.cpu.launch import FIRST_ARGUMENT

CHUNK = 128  # tokens whose scores are computed, exponentiated and summed together
BLOCK_TOKENS_LIMIT = CHUNK
SPAN_CHUNKS = 4
SPAN = CHUNK * SPAN_CHUNKS  # tokens of one task of a decode step; spans are merged in order
PREFILL_ROWS = 96  # query rows (positions x heads of a group) of one task of a prefill

# what differs from call to call
(
    Q,
    Q_STRIDE,  # bytes from token to token
    OUT,
    OUT_STRIDE,
    LSE,  # 0: not wanted
    LSE_STRIDE,
    KEYS,  # the layer's keys in block 0
    VALUES,  # the layer's values in block 0
    TABLES,
    TABLE_STRIDE,
    STARTS,  # 0: row r is sequence r's one query
    CONTEXTS,
    SEQUENCES,
    PARTIALS,  # decode: states of spans, [sequence][span]
    SPANS,  # decode: spans per sequence in PARTIALS
    REMAINING,  # decode: per sequence and part, how many spans are finished
    HEAD_PARTS,  # decode: tasks that share a span by key heads
    SHARED,  # cascade: tokens done before, a multiple of CHUNK
    SUMS,  # score_sums: where to add
    SUMS_STRIDE,  # score_sums: bytes from head to head
    SUMS_SEQUENCE_STRIDE,  # score_sums: bytes from sequence to sequence
) = range(FIRST_ARGUMENT, FIRST_ARGUMENT + 21)
FIRST_FIXED = FIRST_ARGUMENT + 21

# what a model's layers have in common
(
    Q_FORMAT,
    POOL_FORMAT,
    BLOCK_BYTES,
    HEAD_BYTES,
    TOKEN_BYTES,
    BLOCK_SHIFT,  # log2 of block_tokens
    KV_HEADS,
    GROUP,
    HEAD_DIM,
    PADDED_DIM,  # to a multiple of 16
    CAUSAL,
    WINDOW,  # 0: none
    SINKS,  # 0 where there is no window
    SLOPES,  # 0: none
    KV_SCALES,  # 0: none
    FACTOR,  # float64: what a query is multiplied by, see prepare_scores
    SOFT_CAP,  # float64: cap * log2(e), 0: none
    ROWS,  # rows of scratch, a multiple of 16
    AT_QUERIES,  # scratch offsets, in bytes
    AT_SCORES,
    AT_OUTPUT,
    AT_TOTAL,
    AT_PRODUCT,
    AT_KEY_PANELS,
    AT_VALUE_PANELS,
    AT_STAGE,
) = range(FIRST_FIXED, FIRST_FIXED + 26)
ARGUMENTS = FIRST_FIXED + 26

# arrays of ROWS numbers at the start of the scratch, in this order: 8 of float32, then 3 of int64
MAXIMA, SUMS_OF_ROWS, NEW_MAXIMA, NEW_SUMS, OLD_WEIGHTS, NEW_WEIGHTS, TOTAL_MAXIMA, TOTAL_SUMS = range(8)
LOWS, HIGHS, POSITIONS = range(3)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Offsets of one worker's buffers, in the order of the AT_ arguments, and their size."""

    rows: int
    offsets: tuple[int, ...]
    size_bytes: int

    @staticmethod
    def plan(rows: int, padded_dim: int) -> "Scratch":
        """Lay out scratch for up to this many rows of padded_dim channels."""
        rows = -(-rows // 16) * 16
        per_row, panels = rows * padded_dim * 4, CHUNK * padded_dim * 4
        sizes = [per_row, rows * CHUNK * 4, per_row, per_row, per_row, panels, panels, 16 * padded_dim * 4]
        offsets = []
        end = rows * (8 * 4 + 3 * 8)
        for size in sizes:
            end = -(-end // 64) * 64
            offsets.append(end)
            end += size
        return Scratch(rows, tuple(offsets), -(-end // 4096) * 4096 + 64)


def state_floats(q_heads: int, padded_dim: int) -> int:
    """Floats of one span's state in PARTIALS: maxima and sums (padded), then the outputs."""
    return 2 * (-(-q_heads // 16) * 16) + q_heads * padded_dim
