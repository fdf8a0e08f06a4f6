"""Codecs and encryption: what goes in comes out, within the codec's bound, and never under another codec or key."""

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_factories import IDENTITY, disk_bytes, name

from spillway.kvstore import BlockStore, Codecs, ConfigError, Deadlines, KeyRing, StoreConfig
from spillway.kvstore.codecs.keys import TAG_BYTES
from spillway.kvstore.codecs.quantized import _FP8_VALUES, NUMBERS, QuantizedCodec, _fp8_codes
from spillway.kvstore.outcomes import MissReason
from spillway.kvstore.sealing import Sealer

SHAPE = (2, 2, 3, 16, 40)
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": None}
KEYS = {1: bytes(range(32)), 2: bytes(range(32, 64))}


def to_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


def block(dtype: str, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """A block of random values whose keys have a few outlier channels, as real ones do."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=SHAPE).astype(np.float32) * np.float32(scale)
    values[:, 0, :, :, ::13] *= 20
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    return values.astype(dtype).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("codec_name", NUMBERS)
@pytest.mark.parametrize("dtype", TYPES)
class TestQuantized:
    def test_error_is_at_most_half_a_step_of_its_group(self, codec_name: str, dtype: str) -> None:
        raw = block(dtype)
        codec = QuantizedCodec(codec_name, SHAPE, dtype)
        coded = np.zeros(codec.stored_bytes(raw.nbytes), np.uint8)
        codec.encode(raw, coded)
        out = np.zeros_like(raw)
        codec.decode(coded, out)
        before, after = (to_float(data, dtype).reshape(SHAPE) for data in (raw, out))
        for part, axis, values in ((0, -2, before[:, 0]), (1, -1, before[:, 1].reshape(*SHAPE[:1], 3, 16, 1, 40))):
            error = np.abs(after[:, part].reshape(values.shape) - values)
            largest = np.abs(values).max(axis, keepdims=True)
            if codec_name == "fp8":
                # 3 mantissa bits: half a step of the value, or of the smallest code
                bound = np.maximum(np.abs(values) / 16, largest / 448 / 1024) * 1.01
            else:
                steps = {"int8": 255, "int4": 15}[codec_name]
                spread = values.max(axis, keepdims=True) - values.min(axis, keepdims=True)
                bound = spread / steps / 2 + largest * 2**-9 / 2
            rounding = np.abs(values) * (2**-8 if dtype == "bfloat16" else 2**-10 if dtype == "float16" else 0)
            assert (error <= bound + rounding + 1e-6).all()

    def test_length_is_what_was_announced(self, codec_name: str, dtype: str) -> None:
        codec = QuantizedCodec(codec_name, SHAPE, dtype)
        raw_bytes = prod(SHAPE) * (4 if dtype == "float32" else 2)
        groups = SHAPE[0] * (3 * 40 + 3 * 16)
        expected = prod(SHAPE) * (4 if codec_name == "int4" else 8) // 8 + groups * (2 if codec_name == "fp8" else 4)
        assert codec.stored_bytes(raw_bytes) == expected
        with pytest.raises(ConfigError):
            codec.stored_bytes(raw_bytes + 1)

    @pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, 60000.0])
    def test_constant_blocks_survive(self, codec_name: str, dtype: str, value: float) -> None:
        raw = block(dtype, scale=0.0)
        flat = np.full(prod(SHAPE), value, np.float32)
        if dtype == "bfloat16":
            raw = (flat.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            raw = flat.astype(dtype).view(np.uint8)
        codec = QuantizedCodec(codec_name, SHAPE, dtype)
        coded = np.zeros(codec.stored_bytes(raw.nbytes), np.uint8)
        codec.encode(raw, coded)
        out = np.zeros_like(raw)
        codec.decode(coded, out)
        assert np.allclose(to_float(out, dtype), to_float(raw, dtype), rtol=2**-4, atol=1e-6)


@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=50))
def test_fp8_codes_are_the_nearest(values: list[float]) -> None:
    x = np.asarray(values, np.float32)
    got = _FP8_VALUES[_fp8_codes(x)]
    finite = np.unique(_FP8_VALUES[np.isfinite(_FP8_VALUES)])
    clipped = np.clip(x, -448, 448)
    nearest = np.abs(finite[None, :] - clipped[:, None]).min(1)
    assert np.array_equal(np.abs(got - clipped), nearest.astype(np.float32))


def test_fp8_values_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(_FP8_VALUES, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("codec_name", "shape", "dtype"),
    [
        ("int3", SHAPE, "float32"),
        ("int8", SHAPE, "int8"),
        ("int8", (), "float32"),
        ("int8", (2, 3, 3, 16, 40), "float32"),
        ("int4", (2, 2, 3, 16, 41), "float32"),
    ],
)
def test_what_cannot_be_coded_is_refused(codec_name: str, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ConfigError):
        QuantizedCodec(codec_name, shape, dtype)


class TestKeys:
    raw = block("float32")

    def sealer(
        self, ring: KeyRing | None, identity: bytes | None = None, codec: QuantizedCodec | None = None
    ) -> Sealer:
        identity = identity or IDENTITY.digest()
        return Sealer(identity, self.raw.nbytes, codec, ring.for_identity(identity) if ring else None)

    @pytest.mark.parametrize("codec", [None, QuantizedCodec("int8", SHAPE, "float32")])
    def test_round_trip(self, codec: QuantizedCodec | None) -> None:
        sealer = self.sealer(KeyRing(1, KEYS), codec=codec)
        stored = np.zeros(sealer.stored_bytes, np.uint8)
        header = sealer.seal(name(1), self.raw, stored)
        assert sealer.verify(name(1), header, stored) is None
        out = np.zeros_like(self.raw)
        assert sealer.unseal(header, stored, out) is None
        if codec is None:
            assert np.array_equal(out, self.raw)
            assert sealer.stored_bytes == self.raw.nbytes + TAG_BYTES
        else:
            assert np.allclose(out.view(np.float32), self.raw.view(np.float32), atol=1.0)

    def test_the_bytes_do_not_show(self) -> None:
        sealer = self.sealer(KeyRing(1, KEYS))
        plain = np.zeros_like(self.raw)
        one, two = np.zeros(sealer.stored_bytes, np.uint8), np.zeros(sealer.stored_bytes, np.uint8)
        sealer.seal(name(1), plain, one)
        sealer.seal(name(1), plain, two)
        assert not np.array_equal(one, two), "the same nonce twice"
        assert np.unique(one[:4096]).size / 256 > 0.98

    def test_bytes_passed_off_as_another_block_are_refused(self) -> None:
        """An attacker who can write the disk can make any header and checksum, but no tag."""
        sealer = self.sealer(KeyRing(1, KEYS))
        stored = np.zeros(sealer.stored_bytes, np.uint8)
        forged = replace(sealer.seal(name(1), self.raw, stored), block=name(2))
        assert sealer.verify(name(2), forged, stored) is None
        assert sealer.unseal(forged, stored, np.zeros_like(self.raw)) is MissReason.KEY

    def test_a_changed_bit_under_a_fresh_checksum_is_refused(self) -> None:
        sealer = self.sealer(KeyRing(1, KEYS))
        stored = np.zeros(sealer.stored_bytes, np.uint8)
        header = sealer.seal(name(1), self.raw, stored)
        stored[0] ^= 1
        forged = replace(header, checksum=sealer._header(name(1), stored, 1, header.codec_data).checksum)
        assert sealer.verify(name(1), forged, stored) is None
        assert sealer.unseal(forged, stored, np.zeros_like(self.raw)) is MissReason.KEY

    def test_unencrypted_bytes_are_not_taken_for_encrypted_ones(self) -> None:
        header = self.sealer(None).seal_plain(name(1), self.raw)
        assert self.sealer(KeyRing(1, KEYS)).verify(name(1), header, self.raw) is MissReason.KEY

    def test_identities_do_not_share_keys(self) -> None:
        other = replace(IDENTITY, salt="tenant").digest()
        mine, theirs = self.sealer(KeyRing(1, KEYS)), self.sealer(KeyRing(1, KEYS), other)
        stored = np.zeros(mine.stored_bytes, np.uint8)
        header = mine.seal(name(1), self.raw, stored)
        assert theirs.unseal(header, stored, np.zeros_like(self.raw)) is MissReason.KEY

    def test_a_ring_does_not_show_its_keys(self) -> None:
        ring = KeyRing(1, KEYS)
        assert repr(ring) == "KeyRing(current=1, ids=[1, 2])"
        config = StoreConfig(self.raw.nbytes, IDENTITY, host_bytes=1, disk_keys=ring)
        assert KEYS[1].hex() not in repr(config)
        assert repr(KEYS[1])[2:-1] not in repr(config)

    @pytest.mark.parametrize(("current", "keys"), [(3, KEYS), (0, {0: bytes(32)}), (1, {1: bytes(16)}), (1, {})])
    def test_a_ring_that_cannot_work_is_refused(self, current: int, keys: dict[int, bytes]) -> None:
        with pytest.raises(ConfigError):
            KeyRing(current, keys)


RAWS = [block("float32", seed) for seed in range(12)]


class TestStore:
    """Codecs and keys behind the whole store."""

    def config(
        self, directory: Path, host: str = "none", disk: str = "none", keys: KeyRing | None = None
    ) -> StoreConfig:
        length = RAWS[0].nbytes
        return StoreConfig(
            length,
            IDENTITY,
            host_bytes=4 * length,
            disk_bytes=disk_bytes(12) + 12 * length,
            disk_dir=directory,
            disk_free_floor_bytes=0,
            codecs=Codecs(host, disk, SHAPE),
            disk_keys=keys,
            deadlines=Deadlines(put_s=30, load_s=30),
        )

    def get(self, store: BlockStore, atol: float = 0.0) -> list[bool]:
        outs = [np.zeros_like(raw) for raw in RAWS]
        found = store.get_many([(name(number), out) for number, out in enumerate(outs)])
        for out, raw, hit in zip(outs, RAWS, found, strict=True):
            assert not hit or np.allclose(out.view(np.float32), raw.view(np.float32), atol=atol, rtol=0)
        return found

    def put(self, store: BlockStore) -> None:
        assert all(store.put_many([(name(number), raw) for number, raw in enumerate(RAWS)]))
        assert store.flush()

    @pytest.mark.parametrize(("host", "disk"), [("none", "int8"), ("int8", "int8"), ("int8", "int4"), ("fp8", "none")])
    def test_blocks_survive_every_pair_of_codecs(self, tmp_path: Path, host: str, disk: str) -> None:
        with BlockStore.open(self.config(tmp_path, host, disk)) as store:
            self.put(store)
            assert self.get(store, atol=6.0) == [True] * 12
            store.check()
            assert all(tier.verify_failures == 0 for tier in store.stats().tiers.values())
        with BlockStore.open(self.config(tmp_path, host, disk)) as store:
            assert self.get(store, atol=6.0) == [True] * 12

    def test_a_codec_holds_more_blocks_in_the_same_bytes(self, tmp_path: Path) -> None:
        with BlockStore.open(self.config(tmp_path / "a")) as plain:
            self.put(plain)
            many = plain.stats().tiers["host"].blocks
        with BlockStore.open(self.config(tmp_path / "b", host="int4")) as packed:
            self.put(packed)
            assert packed.stats().tiers["host"].blocks > 2 * many

    def test_another_codec_never_reads_what_one_wrote(self, tmp_path: Path) -> None:
        with BlockStore.open(self.config(tmp_path, disk="int8")) as store:
            self.put(store)
        with BlockStore.open(self.config(tmp_path, disk="fp8")) as store:
            assert self.get(store) == [False] * 12

    def test_keys_rotate(self, tmp_path: Path) -> None:
        with BlockStore.open(self.config(tmp_path, keys=KeyRing(1, {1: KEYS[1]}))) as store:
            self.put(store)
            assert self.get(store) == [True] * 12
        for raw in RAWS:
            assert all(raw.tobytes()[:64] not in path.read_bytes() for path in tmp_path.rglob("segment-*"))
        with BlockStore.open(self.config(tmp_path, keys=KeyRing(2, KEYS))) as store:
            assert self.get(store) == [True] * 12, "the old key still reads"
        with BlockStore.open(self.config(tmp_path, keys=KeyRing(2, {2: KEYS[2]}))) as store:
            assert self.get(store) == [False] * 12, "the old key is gone"
            assert store.stats().tiers["disk"].misses["key"] == 12
            store.check()
        with BlockStore.open(self.config(tmp_path)) as store:
            assert self.get(store) == [False] * 12
