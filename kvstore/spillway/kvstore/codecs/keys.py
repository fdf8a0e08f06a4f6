"""Encryption at rest: AES-256-GCM under named keys.

Each identity has keys of its own, derived by HKDF-SHA256, so tenants with different salts never share one. Nonces are
96 random bits, which keeps the chance of a repeat below 2**-32 up to 2**32 blocks under one key (NIST SP 800-38D, 8.3).

To rotate: add a key, make it the current one, and keep the old one until its blocks have been evicted or scrubbed away.
A block whose key is gone is a miss, counted under ``key``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..buffers import Bytes
from ..errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TAG_BYTES = 16
NONCE_BYTES = 12
KEY_BYTES = 32
_HIGHEST_KEY_ID = 2**32 - 1


class KeyRing:
    """Keys of `KEY_BYTES` by id (1 … 2**32 - 1); ``current`` is the id that new blocks are encrypted under."""

    def __init__(self, current: int, keys: Mapping[int, bytes]) -> None:
        """Raise `ConfigError` for a key of another length, a bad id, or a current id without a key."""
        if current not in keys:
            raise ConfigError(f"the current key id {current} is not among the keys {sorted(keys)}")
        for key_id, key in keys.items():
            if not 1 <= key_id <= _HIGHEST_KEY_ID:
                raise ConfigError(f"key ids are 1 … {_HIGHEST_KEY_ID}, not {key_id}")
            if len(key) != KEY_BYTES:
                raise ConfigError(f"key {key_id} has {len(key)} bytes, not {KEY_BYTES}")
        self.current = current
        self._keys = dict(keys)
        self._ciphers: dict[int, AESGCM] = {}

    def __repr__(self) -> str:
        return f"KeyRing(current={self.current}, ids={sorted(self._keys)})"

    def for_identity(self, identity: bytes) -> KeyRing:
        """The keys of one identity, ready for use. Raises `ConfigError` if the ``cryptography`` package is missing."""
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError as error:
            raise ConfigError("encryption at rest needs the extra spillway[encryption]") from error
        derived = {
            key_id: HKDF(SHA256(), KEY_BYTES, salt=identity, info=b"spillway.kv.at-rest").derive(key)
            for key_id, key in self._keys.items()
        }
        ring = KeyRing(self.current, derived)
        ring._ciphers = {key_id: AESGCM(key) for key_id, key in derived.items()}
        return ring

    def encrypt(self, plain: Bytes, bound: bytes, out: Bytes) -> bytes:
        """Write ciphertext and tag into ``out`` (`TAG_BYTES` longer than ``plain``); returns the nonce."""
        nonce = os.urandom(NONCE_BYTES)
        self._ciphers[self.current].encrypt_into(nonce, plain.data, bound, out.data)
        return nonce

    def decrypt(self, key_id: int, codec_data: bytes, sealed: Bytes, bound: bytes, out: Bytes) -> bool:
        """Write the plain bytes into ``out``; False if the key is not on the ring or the tag does not fit."""
        from cryptography.exceptions import InvalidTag

        cipher = self._ciphers.get(key_id)
        if cipher is None:
            return False
        try:
            cipher.decrypt_into(codec_data[:NONCE_BYTES], sealed.data, bound, out.data)
        except InvalidTag:
            return False
        return True
