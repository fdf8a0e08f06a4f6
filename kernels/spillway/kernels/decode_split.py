"""How far decode cuts a context: what its memory goes by, apart from the kernels that do it.

A cut depends on nothing but the sequence's own length, so a row's value is the same whatever shares its batch.
"""

MIN_SPAN_TOKENS = 256
"""A span shorter than this is not worth a partial result."""


def most_spans(kv_heads: int) -> int:
    """Upper bound of the spans of one sequence: a single one should still fill a GPU over its kv heads."""
    return max(32, 256 // kv_heads)


def spans_within(kv_heads: int, max_tokens: int) -> int:
    """The same for a sequence of at most so many tokens; at least one."""
    return max(1, min(most_spans(kv_heads), -(-max_tokens // MIN_SPAN_TOKENS)))


def decode_scratch_bytes(rows: int, query_heads: int, kv_heads: int, head_dim: int) -> int:
    """What `paged_decode` of so many rows takes on a GPU for partial results, at most, beside its arguments."""
    return rows * most_spans(kv_heads) * query_heads * (head_dim + 1) * 4
