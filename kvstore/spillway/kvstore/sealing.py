"""From a block's bytes to what a tier stores, and back. The one place where a loaded block is verified.

The checksum is taken once, from the bytes as they are first stored, and travels with them from tier to tier as long as
the tiers store them in the same form. So damage on the way (a bad copy, a bad host page, a bad disk sector) is found
wherever the block is loaded from in the end; where the form changes, the bytes are verified before they are changed.
"""

from __future__ import annotations

from .buffers import Bytes, ThreadBuffer, copy
from .codecs.base import Codec
from .codecs.keys import TAG_BYTES, KeyRing
from .header import CODEC_DATA_BYTES, BlockHeader, checksum_of
from .identity import BlockHash
from .outcomes import MissReason


class Sealer:
    """How one tier stores the blocks of one identity: as they are, or through a codec, or encrypted, or both.

    Thread-safe. ``stored_bytes`` is the same for every block. ``plain``: stored bytes are the block's own bytes.
    """

    def __init__(
        self, identity: bytes, raw_bytes: int, codec: Codec | None = None, keys: KeyRing | None = None
    ) -> None:
        self.identity = identity
        self.raw_bytes = raw_bytes
        self._codec = codec
        self._keys = keys
        self._coded_bytes = codec.stored_bytes(raw_bytes) if codec else raw_bytes
        self.stored_bytes = self._coded_bytes + (TAG_BYTES if keys else 0)
        self.plain = codec is None and keys is None
        self._coded = ThreadBuffer(self._coded_bytes if codec and keys else 0)

    def same_form(self, other: Sealer) -> bool:
        """Whether what ``other`` stored can be stored here as it is."""
        return self._codec is other._codec and self._keys is other._keys

    def seal(self, block: BlockHash, raw: Bytes, out: Bytes) -> BlockHeader:
        """Write the stored form of ``raw`` into the start of ``out``. Not for a plain sealer: use `seal_plain`."""
        codec_data, key_id = b"", 0
        if self._keys is None:
            self._encode(raw, out)
        else:
            coded = raw
            if self._codec is not None:
                coded = self._coded.bytes
                self._encode(raw, coded)
            key_id = self._keys.current
            codec_data = self._keys.encrypt(coded[: self._coded_bytes], self._bound(block), out[: self.stored_bytes])
        return self._header(block, out, key_id, codec_data)

    def seal_plain(self, block: BlockHash, raw: Bytes) -> BlockHeader:
        """The header of a block that is stored as it is."""
        return self._header(block, raw, 0, b"")

    def verify(self, block: BlockHash, header: BlockHeader, stored: Bytes) -> MissReason | None:
        """Hold a loaded block against what was asked for; None if it is that block, whole and undamaged.

        ``stored`` is the buffer the tier loaded into: its first ``header.stored_bytes`` bytes are the block.
        """
        if header.block != block:
            return MissReason.HEADER
        if header.identity != self.identity:
            return MissReason.IDENTITY
        if header.codec != (self._codec.number if self._codec else 0):
            return MissReason.CODEC
        if (header.key_id != 0) != (self._keys is not None):
            return MissReason.KEY
        if header.raw_bytes != self.raw_bytes or header.stored_bytes != self.stored_bytes:
            return MissReason.LENGTH
        if header.stored_bytes > stored.nbytes:
            return MissReason.LENGTH
        if checksum_of(stored[: header.stored_bytes]) != header.checksum:
            return MissReason.CHECKSUM
        return None

    def unseal(self, header: BlockHeader, stored: Bytes, out: Bytes) -> MissReason | None:
        """Write the block's own bytes into ``out``; None if that worked. ``stored`` must have passed `verify`."""
        coded = stored[: header.stored_bytes]
        if self._keys is not None:
            decrypted = out if self._codec is None else self._coded.bytes
            if not self._keys.decrypt(header.key_id, header.codec_data, coded, self._bound(header.block), decrypted):
                return MissReason.KEY
            coded = decrypted
        if self._codec is not None:
            self._codec.decode(coded[: self._coded_bytes], out)
        elif self._keys is None:
            copy(out, coded)
        return None

    def _encode(self, raw: Bytes, out: Bytes) -> None:
        if self._codec is None:
            copy(out[: self._coded_bytes], raw)
        else:
            self._codec.encode(raw, out[: self._coded_bytes])

    def _header(self, block: BlockHash, stored: Bytes, key_id: int, codec_data: bytes) -> BlockHeader:
        return BlockHeader(
            block=block,
            identity=self.identity,
            raw_bytes=self.raw_bytes,
            stored_bytes=self.stored_bytes,
            checksum=checksum_of(stored[: self.stored_bytes]),
            codec=self._codec.number if self._codec else 0,
            key_id=key_id,
            codec_data=codec_data.ljust(CODEC_DATA_BYTES, b"\0"),
        )

    def _bound(self, block: BlockHash) -> bytes:
        """What the cipher's tag binds the bytes to, so that they cannot be passed off as another block or form."""
        codec = self._codec.number if self._codec else 0
        return b"".join((block, self.identity, self.raw_bytes.to_bytes(8, "little"), codec.to_bytes(2, "little")))
