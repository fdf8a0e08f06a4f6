"""From a checkpoint's files to one rank's weights: only its slices are read, fused and converted on the way."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spillway.node_agent.checkpoint import Checkpoint, WeightReader
from spillway.node_agent.models.errors import WeightMismatchError
from spillway.node_agent.models.linear import Linear, compute_dtype, make_linear
from spillway.node_agent.models.registry import family_of
from spillway.node_agent.models.shard import WHOLE, TensorShard
from spillway.node_agent.models.spec import DecoderSpec, WeightNames

_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 5


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer of one rank. Hq, Hkv and I are the rank's own heads and MLP columns."""

    input_norm: Tensor
    qkv: Linear
    """hidden → (Hq + 2 · Hkv) · head_dim: all q heads, all k heads, all v heads."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gated: Linear
    """hidden → I: silu(gate) · up."""
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """All weights of one rank."""

    embedding: Tensor
    """``[rank's vocabulary, hidden]``."""
    layers: Sequence[LayerWeights]
    final_norm: Tensor
    lm_head: Linear
    """hidden → the rank's vocabulary."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How and where weights are held."""

    device: torch.device
    dtype: torch.dtype
    """What values are rounded to. What they are held and computed in is `compute_dtype`."""
    shard: TensorShard = WHOLE
    context_tokens: int | None = None
    """Tokens of the longest sequence that will come; None: the model's own limit, which can be many millions."""


def load_weights(checkpoint: Checkpoint, options: LoadOptions) -> DecoderWeights:
    """Read one rank's weights. Memory peaks at what is returned plus one fused weight.

    Raises:
        WeightMismatchError: weights missing, left over, or of another shape or dtype than the spec says.
        CorruptCheckpointError: a file that cannot be read.
        ShardError: a model that cannot be split this way.
    """
    options.shard.check(checkpoint.spec)
    check_weights(checkpoint)
    loader = _Loader(checkpoint, options)
    with torch.inference_mode():
        # The largest pieces first: what they need on the way is given back before the rest fills memory.
        embedding, lm_head = loader.embeddings()
        layers = []
        for number in range(checkpoint.spec.layers):
            _give_back_freed_memory()
            layers.append(loader.layer(number))
        _give_back_freed_memory()
        return DecoderWeights(embedding, layers, loader.final_norm(), lm_head)


def _give_back_freed_memory() -> None:
    """Have glibc return free pages to the system. Packing leaves holes between what stays, a third of a small model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_weights(checkpoint: Checkpoint) -> None:
    """Compare the files' headers with the spec, before anything is read.

    Raises:
        WeightMismatchError: see `load_weights`; the message names the first few.
    """
    names = family_of(checkpoint.spec.model_type).names
    expected = expected_shapes(checkpoint.spec, names)
    ignored = [*names.ignored, *([re.escape(f"{names.lm_head}.weight")] if checkpoint.spec.tied_embeddings else [])]
    found = {
        name: info
        for name, info in checkpoint.weights.items()
        if name in expected or not any(re.fullmatch(pattern, name) for pattern in ignored)
    }
    _refuse("missing from the checkpoint", sorted(expected.keys() - found.keys()))
    _refuse("in the checkpoint but not in the model", sorted(found.keys() - expected.keys()))
    shapes = [f"{n} is {list(i.shape)}, not {list(expected[n])}" for n, i in found.items() if i.shape != expected[n]]
    _refuse("of a shape that the config contradicts", shapes)
    _refuse("of a dtype that is not read", [f"{n} is {i.dtype}" for n, i in found.items() if i.dtype not in _STORED])


def expected_shapes(spec: DecoderSpec, names: WeightNames) -> dict[str, tuple[int, ...]]:
    """Full name → shape of every weight that `spec` needs."""
    hidden, inner = spec.hidden, spec.intermediate
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    linears = [(names.q, q, hidden, spec.qkv_bias), (names.k, kv, hidden, spec.qkv_bias)]
    linears += [(names.v, kv, hidden, spec.qkv_bias), (names.o, hidden, q, spec.o_bias)]
    linears += [(name, inner, hidden, spec.mlp_bias) for name in (names.gate, names.up)]
    linears += [(names.down, hidden, inner, spec.mlp_bias)]
    norms = [(names.input_norm, hidden), (names.post_norm, hidden)]
    norms += [(name, spec.head_dim) for name in (names.q_norm, names.k_norm)] if spec.qk_norm else []
    shapes: dict[str, tuple[int, ...]] = {
        f"{names.embedding}.weight": (spec.vocab, hidden),
        f"{names.final_norm}.weight": (hidden,),
    }
    if not spec.tied_embeddings:
        shapes[f"{names.lm_head}.weight"] = (spec.vocab, hidden)
    for layer in range(spec.layers):
        for name, rows, columns, bias in linears:
            shapes[f"{name.format(layer)}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name.format(layer)}.bias"] = (rows,)
        for name, width in norms:
            shapes[f"{name.format(layer)}.weight"] = (width,)
    return shapes


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightMismatchError(f"weights {what}: {', '.join(problems[:_SHOWN])}{more}")


class _Loader:
    """Builds the rank's tensors one by one. On CPU fused weights pass through one staging buffer and are packed."""

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec
        self._names = family_of(checkpoint.spec.model_type).names
        self._options = options
        self._compute = compute_dtype(options.device, options.dtype)
        self._staging = torch.empty(0, dtype=self._compute)

    def embeddings(self) -> tuple[Tensor, Linear]:
        """The embedding rows, and the output head."""
        rows = self._options.shard.vocab_rows(self._spec)
        with self._checkpoint.reader() as reader:
            embedding = reader.view(f"{self._names.embedding}.weight")[rows]
            head = embedding if self._spec.tied_embeddings else reader.view(f"{self._names.lm_head}.weight")[rows]
            if self._options.device.type == "cpu":
                lm_head = make_linear(self._fused([head]), None, self._options.dtype)
                self._staging = torch.empty(0, dtype=self._compute)
                # Rows are gathered, not multiplied: where the checkpoint's dtype is narrow it can stay so.
                return embedding.to(self._gather_dtype(embedding.dtype), copy=True), lm_head
            weight = self._fused([embedding])
            head_weight = weight if self._spec.tied_embeddings else self._fused([head])
            return weight, make_linear(head_weight, None, self._options.dtype)

    def layer(self, number: int) -> LayerWeights:
        """One decoder layer."""
        spec, shard, names = self._spec, self._options.shard, self._names
        q, kv, mlp, every = shard.q_rows(spec), shard.kv_rows(spec), shard.mlp_rows(spec), slice(None)
        qkv = ((names.q, q), (names.k, kv), (names.v, kv))
        gate_up = ((names.gate, mlp), (names.up, mlp))
        first = shard.rank == 0  # a bias on partial sums is added by one rank
        with self._checkpoint.reader() as reader:
            part = _Layer(reader, number)
            return LayerWeights(
                input_norm=self._vector([part.vector(names.input_norm)]),
                qkv=self._linear([part.matrix(*at) for at in qkv], part.biases(spec.qkv_bias, *qkv)),
                q_norm=self._vector([part.vector(names.q_norm)]) if spec.qk_norm else None,
                k_norm=self._vector([part.vector(names.k_norm)]) if spec.qk_norm else None,
                o=self._linear([part.matrix(names.o, every, q)], part.biases(spec.o_bias and first, (names.o, every))),
                post_norm=self._vector([part.vector(names.post_norm)]),
                gated=self._linear(
                    [part.matrix(*at) for at in gate_up], part.biases(spec.mlp_bias, *gate_up), gated=True
                ),
                down=self._linear(
                    [part.matrix(names.down, every, mlp)], part.biases(spec.mlp_bias and first, (names.down, every))
                ),
            )

    def final_norm(self) -> Tensor:
        """The norm before the output head."""
        with self._checkpoint.reader() as reader:
            return self._vector([reader.view(f"{self._names.final_norm}.weight")])

    def _gather_dtype(self, stored: torch.dtype) -> torch.dtype:
        if self._options.dtype != torch.float32:
            return self._options.dtype
        return stored if stored.itemsize < self._compute.itemsize else self._compute

    def _linear(self, parts: list[Tensor], biases: list[Tensor], *, gated: bool = False) -> Linear:
        bias = self._vector(biases) if biases else None
        return make_linear(self._fused(parts), bias, self._options.dtype, gated=gated)

    def _vector(self, parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts).to(self._options.dtype).to(self._compute, copy=True)
        return joined.to(self._options.device)

    def _fused(self, parts: list[Tensor]) -> Tensor:
        """``[sum of rows, columns]`` in the compute dtype; on CPU in the staging buffer, valid until the next call."""
        rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
        if self._options.device.type == "cpu":
            if self._staging.numel() < rows * columns:
                self._staging = torch.empty(rows * columns, dtype=self._compute)
            fused = self._staging[: rows * columns].view(rows, columns)
        else:
            fused = torch.empty(rows, columns, dtype=self._compute, device=self._options.device)
        at = 0
        for part in parts:
            rounded = part if part.dtype == self._options.dtype else part.to(self._options.dtype)
            fused[at : at + part.shape[0]].copy_(rounded)
            at += part.shape[0]
        return fused


@dataclass(frozen=True, slots=True)
class _Layer:
    """Slices of one layer's weights, by name template."""

    reader: WeightReader
    number: int

    def matrix(self, name: str, rows: slice, columns: slice = slice(None)) -> Tensor:
        return self.reader.view(f"{name.format(self.number)}.weight")[rows, columns]

    def vector(self, name: str) -> Tensor:
        return self.reader.view(f"{name.format(self.number)}.weight")

    def biases(self, wanted: bool, *parts: tuple[str, slice]) -> list[Tensor]:
        return [self.reader.view(f"{name.format(self.number)}.bias")[rows] for name, rows in parts if wanted]
