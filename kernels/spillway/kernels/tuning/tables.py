"""Which tile an attention kernel runs with.

``tables/`` holds one TOML file per GPU (``nvidia_h200.toml``, written by ``python -m spillway.kernels.tuning``), one
per compute capability (``sm_90.toml``) and ``default.toml``, which fits every GPU from sm_80 on. A tile is looked for
in that order; the first entry that fits counts. Entries name what decides a kernel's appetite for registers and shared
memory: the padded head dimension, the bits of a product's operand and of a stored value, and whether scores are biased
(soft cap or ALiBi); a name left out fits all.

``depth`` is how many KV tiles are on their way while one is worked on. The page lookup makes every KV load an indirect
one, for which Triton's pipeliner spends two of its stages per tile, so ``num_stages = 2 * depth + 1``: a plain
``num_stages=4`` would prefetch no more than 3 does.
"""

import contextlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources

import torch

from spillway.kernels.errors import KernelValueError
from spillway.kernels.tuning.gpu import Gpu, gpu_of, power_of_two


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Query rows (tokens times heads of a group) and keys of a tile, warps per program, KV tiles in flight."""

    rows: int
    keys: int
    warps: int
    depth: int

    @property
    def num_stages(self) -> int:
        """Triton's pipeline stages for this depth."""
        return 2 * self.depth + 1


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Keys of a tile, warps per program, KV tiles in flight, and programs per multiprocessor in the fixed grid."""

    keys: int
    warps: int
    depth: int
    programs: int

    @property
    def num_stages(self) -> int:
        """Triton's pipeline stages for this depth."""
        return 2 * self.depth + 1


@dataclass(frozen=True, slots=True)
class TileKey:
    """What a tile depends on."""

    padded_dim: int
    operand_bits: int
    pool_bits: int
    biased: bool


Tile = PrefillTile | DecodeTile
_trial: Tile | None = None


@contextlib.contextmanager
def trying(tile: Tile) -> Iterator[None]:
    """Within, ops that take this kind of tile take this one, whatever the tables say: how a tile is measured."""
    global _trial  # noqa: PLW0603 - one process tries one tile at a time
    before, _trial = _trial, tile
    try:
        yield
    finally:
        _trial = before


def file_names(gpu: Gpu) -> tuple[str, str, str]:
    """The tables to look into, most special first."""
    name = gpu.name.lower().replace(" ", "_").replace("-", "_")
    return f"{name}.toml", f"sm_{gpu.capability[0]}{gpu.capability[1]}.toml", "default.toml"


@lru_cache
def _entries(file_name: str) -> dict[str, list[dict[str, int]]]:
    file = resources.files(__package__) / "tables" / file_name
    if not file.is_file():
        return {}
    entries: dict[str, list[dict[str, int]]] = tomllib.loads(file.read_text())
    return entries


def find_entry(gpu: Gpu, op: str, key: TileKey) -> dict[str, int]:
    """The numbers of the first entry for op and key.

    Raises:
        KernelValueError: no table has one, not even the default.
    """
    wanted = {field.name: getattr(key, field.name) for field in fields(key)}
    for file_name in file_names(gpu):
        for entry in _entries(file_name).get(op, []):
            if all(entry.get(name, value) == value for name, value in wanted.items()):
                return {name: value for name, value in entry.items() if name not in wanted}
    raise KernelValueError(f"no tile for {op} with {wanted}")


@lru_cache
def _prefill_tile(gpu: Gpu, op: str, key: TileKey) -> PrefillTile:
    return PrefillTile(**find_entry(gpu, op, key))


@lru_cache
def _decode_tile(gpu: Gpu, key: TileKey) -> DecodeTile:
    return DecodeTile(**find_entry(gpu, "decode", key))


def prefill_tile(device: torch.device, key: TileKey, group: int, rows_wanted: int) -> PrefillTile:
    """The tile of `flash_prefill`; a lower one where a whole batch has no more rows than that."""
    if isinstance(_trial, PrefillTile):
        return _trial
    tile = _prefill_tile(gpu_of(device), "prefill_small" if rows_wanted <= 64 else "prefill", key)
    if group <= tile.rows:
        return tile
    return PrefillTile(power_of_two(group), tile.keys, tile.warps, tile.depth)


def decode_tile(device: torch.device, key: TileKey) -> DecodeTile:
    """The tile of `paged_decode`. It must not depend on the batch: where a context is split decides its rounding."""
    return _trial if isinstance(_trial, DecodeTile) else _decode_tile(gpu_of(device), key)
