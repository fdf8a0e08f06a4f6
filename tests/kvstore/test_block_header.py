"""Headers: read back whole, or not at all."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from kv_factories import IDENTITY, OTHER_IDENTITY, content, header_of, name

from spillway.kvstore.header import CODEC_DATA_BYTES, HEADER_BYTES, BlockHeader, unpack
from spillway.kvstore.outcomes import MissReason
from spillway.kvstore.sealing import Sealer

HEADERS = st.builds(
    BlockHeader,
    block=st.binary(min_size=32, max_size=32),
    identity=st.binary(min_size=32, max_size=32),
    raw_bytes=st.integers(0, 2**63),
    stored_bytes=st.integers(0, 2**63),
    checksum=st.integers(0, 2**64 - 1),
    codec=st.integers(0, 2**16 - 1),
    key_id=st.integers(0, 2**32 - 1),
    codec_data=st.binary(min_size=CODEC_DATA_BYTES, max_size=CODEC_DATA_BYTES),
)


@given(HEADERS, st.integers(0, 2**64 - 1))
def test_a_header_reads_back_as_it_was(header: BlockHeader, sequence: int) -> None:
    packed = header.pack(sequence)
    assert len(packed) == HEADER_BYTES
    assert unpack(packed + b"rest of the page") == (header, sequence)


@given(HEADERS, st.integers(0, 2**63), st.data())
def test_a_flipped_bit_or_a_missing_byte_makes_it_no_header(
    header: BlockHeader, sequence: int, data: st.DataObject
) -> None:
    packed = bytearray(header.pack(sequence))
    bit = data.draw(st.integers(0, 8 * HEADER_BYTES - 1))
    packed[bit // 8] ^= 1 << bit % 8
    assert unpack(bytes(packed)) is None
    assert unpack(header.pack(sequence)[: data.draw(st.integers(0, HEADER_BYTES - 1))]) is None


def test_an_empty_page_is_no_header() -> None:
    assert unpack(bytes(4096)) is None


class TestVerify:
    """`Sealer.verify` names what is wrong with a loaded block."""

    data = content(1)
    header = header_of(1, data)
    sealer = Sealer(IDENTITY.digest(), data.nbytes)

    def test_accepts_the_block_itself(self) -> None:
        assert self.sealer.verify(name(1), self.header, self.data) is None

    def test_refuses_another_block_under_its_own_header(self) -> None:
        assert self.sealer.verify(name(2), self.header, self.data) is MissReason.HEADER

    def test_refuses_another_identity(self) -> None:
        other = Sealer(OTHER_IDENTITY.digest(), self.data.nbytes)
        assert other.verify(name(1), self.header, self.data) is MissReason.IDENTITY

    def test_refuses_another_length(self) -> None:
        shorter = replace(self.header, raw_bytes=100, stored_bytes=100)
        assert self.sealer.verify(name(1), shorter, self.data) is MissReason.LENGTH
        assert self.sealer.verify(name(1), self.header, self.data[:-1]) is MissReason.LENGTH

    def test_refuses_another_codec_and_a_key_it_does_not_use(self) -> None:
        assert self.sealer.verify(name(1), replace(self.header, codec=2), self.data) is MissReason.CODEC
        assert self.sealer.verify(name(1), replace(self.header, key_id=1), self.data) is MissReason.KEY

    @given(bit=st.integers(0, 8 * 8192 - 1))
    def test_refuses_a_single_flipped_bit(self, bit: int) -> None:
        damaged = self.data.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        assert self.sealer.verify(name(1), self.header, damaged) is MissReason.CHECKSUM
