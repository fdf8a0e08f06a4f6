"""Names of blocks: what a block's bytes depend on, hashed. The same on every host, for ever."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NewType

from .errors import ConfigError, TokenIdError

BlockHash = NewType("BlockHash", bytes)
"""32 bytes that name a block's content and everything that makes its bytes incompatible."""

HASH_BYTES = 32
FORMAT_VERSION = 1
"""Rises when the layout of a block's bytes or the way it is hashed changes: older blocks then are another identity."""

_TOKEN_ID_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class KVIdentity:
    """Everything besides the tokens that a block's bytes depend on. Two stores share blocks only if all fields agree.

    ``weights_digest``: digest of the weights' bytes, as text (not a model name: names are reused for other weights).
    ``kv_dtype``, ``kv_quantization``: element type and quantization of the block's bytes on the device.
    ``layers``: the half-open range of layers ``(first, end)`` whose KV a block holds.
    ``tensor_rank``, ``tensor_size``: which slice of the heads.
    ``positions_digest``: digest of rope and position settings, as text.
    ``salt``: isolates tenants; stores with different salts never share a block.
    """

    weights_digest: str
    kv_dtype: str
    kv_quantization: str
    block_tokens: int
    layers: tuple[int, int]
    tensor_rank: int
    tensor_size: int
    positions_digest: str
    salt: str = ""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a field that cannot be."""
        first, end = self.layers
        if not 0 <= first < end:
            raise ConfigError(f"layers must be a range (first, end) with 0 <= first < end, not {self.layers}")
        if self.block_tokens < 1:
            raise ConfigError(f"block_tokens must be at least 1, not {self.block_tokens}")
        if not 0 <= self.tensor_rank < self.tensor_size:
            raise ConfigError(f"tensor_rank must be below tensor_size {self.tensor_size}, not {self.tensor_rank}")

    def digest(self) -> bytes:
        """32 bytes over every field and the format version: SHA-256 of length-prefixed ``name=value`` items."""
        hasher = hashlib.sha256(b"spillway.kv.identity")
        items = [
            ("format", repr(FORMAT_VERSION)),
            *((field.name, repr(getattr(self, field.name))) for field in fields(self)),
        ]
        for name, value in items:
            item = f"{name}={value}".encode()
            hasher.update(len(item).to_bytes(4, "little"))
            hasher.update(item)
        return hasher.digest()

    def root(self) -> BlockHash:
        """The parent of every first block under this identity."""
        return BlockHash(hashlib.sha256(b"spillway.kv.root" + self.digest()).digest())


def block_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Name the block that holds ``token_ids`` after the blocks that ``parent`` names.

    SHA-256 over the parent and the ids as little-endian uint32. A block with fewer tokens has another name, so a
    partial block is never taken for a full one. Raises `TokenIdError` for an id that is no uint32 or an empty sequence.
    """
    if len(token_ids) == 0:
        raise TokenIdError("a block holds at least one token")
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise TokenIdError(f"token ids must be integers in 0 … {_TOKEN_ID_LIMIT - 1}") from error
    if _SWAP:
        packed.byteswap()
    return BlockHash(hashlib.sha256(parent + packed.tobytes()).digest())


_SWAP = array("I", [1]).tobytes()[0] != 1
"""Whether this host is big-endian."""
