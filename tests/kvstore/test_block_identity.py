"""What a block's name depends on."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_factories import IDENTITY

from spillway.kvstore import ConfigError, KVIdentity, TokenIdError, block_hash

OTHER_VALUES = {
    "weights_digest": "other",
    "kv_dtype": "bfloat16",
    "kv_quantization": "int8",
    "block_tokens": 32,
    "layers": (0, 3),
    "tensor_rank": 1,
    "tensor_size": 3,
    "positions_digest": "other",
    "salt": "tenant",
}
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)


@pytest.mark.parametrize("field", [field.name for field in fields(KVIdentity)])
def test_every_field_separates_identities(field: str) -> None:
    wide = replace(IDENTITY, tensor_size=2)
    other = replace(wide, **{field: OTHER_VALUES[field]})
    assert other.digest() != wide.digest()
    assert other.root() != wide.root()


def test_names_are_fixed_for_ever() -> None:
    """A change of these values makes every store on disk worthless: it must be meant, and raise the format version."""
    assert IDENTITY.root().hex() == "0401cce11a60670b5f15de4846cc93c3d1ace9d52587c191c408371a9043208e"
    assert (
        block_hash(IDENTITY.root(), [1, 2, 3]).hex()
        == "ab3f84110a5be6d8ad81ccf5bbb897338b0d9e0baf64b5809d66d081fb2f1044"
    )


def test_neighbouring_fields_do_not_run_into_each_other() -> None:
    one = replace(IDENTITY, weights_digest="ab", kv_dtype="c")
    two = replace(IDENTITY, weights_digest="a", kv_dtype="bc")
    assert one.digest() != two.digest()


@given(TOKENS, TOKENS)
def test_names_agree_only_for_equal_tokens(one: list[int], two: list[int]) -> None:
    root = IDENTITY.root()
    assert (block_hash(root, one) == block_hash(root, two)) == (one == two)


@given(TOKENS, TOKENS, TOKENS)
def test_a_name_depends_on_everything_before_it(first: list[int], second: list[int], tail: list[int]) -> None:
    root = IDENTITY.root()
    same = block_hash(block_hash(root, first), tail) == block_hash(block_hash(root, second), tail)
    assert same == (first == second)


@given(TOKENS)
def test_any_sequence_of_integers_gives_the_same_name(tokens: list[int]) -> None:
    root = IDENTITY.root()
    expected = block_hash(root, tokens)
    assert block_hash(root, tuple(tokens)) == expected
    assert block_hash(root, np.asarray(tokens, dtype=np.int64)) == expected
    assert block_hash(root, np.asarray(tokens, dtype=np.uint32)) == expected


@pytest.mark.parametrize("tokens", [[], [-1], [2**32], [1.5], ["a"]])
def test_what_is_no_token_id_is_refused(tokens: list[int]) -> None:
    with pytest.raises(TokenIdError):
        block_hash(IDENTITY.root(), tokens)


@pytest.mark.parametrize(
    "change", [{"layers": (2, 2)}, {"layers": (-1, 2)}, {"block_tokens": 0}, {"tensor_rank": 1}, {"tensor_rank": -1}]
)
def test_an_identity_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(IDENTITY, **change)
