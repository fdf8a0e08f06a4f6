"""A Hugging Face checkpoint folder: its config, what its safetensors files hold, and their identity."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from spillway.node_agent.models.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedModelError,
)
from spillway.node_agent.models.registry import family_of, spec_of
from spillway.node_agent.models.spec import DecoderSpec

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_DIGEST_CHUNK_BYTES = 32 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """Where one weight is, and what its header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: F32, BF16, …"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; no weight was read yet, but every header was."""

    folder: Path
    config: Any = field(repr=False)
    """The transformers config."""
    spec: DecoderSpec = field(repr=False)
    weights: Mapping[str, WeightInfo] = field(repr=False)

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a folder, or a hub id (downloaded unless it is in the hub's cache already).

        Raises:
            CheckpointNotFoundError: neither a folder nor a hub id that can be had.
            CorruptCheckpointError: config, index or weight files that cannot be read.
            UnsupportedModelError: a model that cannot be run.
        """
        folder = find_folder(model)
        config = load_config(folder)
        return cls(folder, config, spec_of(config), _read_headers(folder))

    def digest(self) -> bytes:
        """32 bytes that name the model's content: its spec and every byte of its weight files.

        KV computed by other weights of the same shape must never be found, so nothing short of the whole content will
        do, and a digest cached by size and time would trust a file that was swapped. SHA-256 over pieces of 32 MiB, on
        all cores, then over the pieces' digests: 1 to 2 GB/s for each core with SHA instructions, less than reading the
        weights from a disk takes, and it leaves them in the page cache for the load that follows.

        Raises:
            CorruptCheckpointError: a file that cannot be read.
        """
        files = sorted({info.file for info in self.weights.values()})
        whole = hashlib.sha256(repr(self.spec).encode())
        try:
            sizes = [file.stat().st_size for file in files]
            pieces = [(file, start) for file, size in zip(files, sizes, strict=True) for start in _starts(size)]
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                for piece in pool.map(_digest_piece, pieces):
                    whole.update(piece)
        except OSError as error:
            raise CorruptCheckpointError(f"cannot read the weights: {error}") from error
        whole.update(repr(sizes).encode())
        return whole.digest()

    @contextmanager
    def reader(self) -> Iterator[WeightReader]:
        """Read weights inside the context. The files are mapped there: leave it often, their pages count as ours."""
        reader = WeightReader(self.weights)
        try:
            yield reader
        finally:
            reader.close()


class WeightReader:
    """Hands out weights as views of mapped files: only what is copied out of a view is ever read from the disk."""

    def __init__(self, weights: Mapping[str, WeightInfo]) -> None:
        self._weights = weights
        self._files: dict[Path, Any] = {}

    def view(self, name: str) -> torch.Tensor:
        """The weight in its stored dtype; do not write to it, nor keep it past the reader's context.

        Raises:
            CorruptCheckpointError: a file that cannot be mapped.
        """
        path = self._weights[name].file
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            return self._files[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CorruptCheckpointError(f"{path.name}: {error}") from error

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()


def find_folder(model: str | Path) -> Path:
    """The folder of a local checkpoint, or the hub's snapshot of it (weights, config and tokenizer only).

    Raises:
        CheckpointNotFoundError: neither a folder nor a hub id that can be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~")):
        raise CheckpointNotFoundError(f"{model} is not a folder")
    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointNotFoundError(
            f"{model!r} is neither a folder nor a hub id that can be had: {reason}"
        ) from error


def load_config(folder: Path) -> Any:
    """The transformers config of a checkpoint folder.

    Raises:
        CheckpointNotFoundError: no config.json.
        CorruptCheckpointError: a config.json that is not JSON, or has no model_type.
        UnsupportedModelError: a model type we do not run, or settings that transformers refuses.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointNotFoundError(f"{folder} has no config.json: not a Hugging Face checkpoint")
    model_type = _read_json(path).get("model_type")
    if not isinstance(model_type, str):
        raise CorruptCheckpointError("config.json names no model_type")
    family = family_of(model_type)
    try:
        return family.config.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises for a config it does not take
        raise UnsupportedModelError(f"config.json is refused by transformers: {error}") from error


def _read_headers(folder: Path) -> dict[str, WeightInfo]:
    weights: dict[str, WeightInfo] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name in weights:
                        raise CorruptCheckpointError(f"{name} is in {weights[name].file.name} and in {file.name}")
                    view = opened.get_slice(name)
                    weights[name] = WeightInfo(file, tuple(view.get_shape()), str(view.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise CorruptCheckpointError(f"{file.name}: {error}") from error
    return weights


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            hint = "; only safetensors are read: convert the .bin files" if any(folder.glob("*.bin")) else ""
            raise CheckpointNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}{hint}")
        return [folder / _SINGLE]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{_INDEX} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CorruptCheckpointError(f"{_INDEX} points outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise CorruptCheckpointError(f"{_INDEX} names {name}, which is not there")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise CorruptCheckpointError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path.name} is not a JSON object")
    return value


def _starts(size: int) -> range:
    return range(0, size, _DIGEST_CHUNK_BYTES)


def _digest_piece(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = _DIGEST_CHUNK_BYTES
        while left and (got := file.readinto(memoryview(buffer)[: min(left, _READ_BYTES)])):
            digest.update(memoryview(buffer)[:got])
            left -= got
    return digest.digest()
